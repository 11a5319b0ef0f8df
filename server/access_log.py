"""Follows each request: its id, and the one line it leaves in the log. Not what was said, unless asked to."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler

from server.app_keys import USER

REQUEST_ID_HEADER = "X-Request-Id"

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = frozenset({"/health", "/metrics"})
_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that did not wait for the answer; it is only ever logged."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Trace:
    """What is known of one HTTP request while it is served."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    response_id: str = ""
    """The id that the answer carries, where it carries one."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft: float | None = None
    """Seconds to the first token."""
    prompts: list[str] = field(default_factory=list)
    """What was asked, if it is to be logged."""

    def log(self, request: web.BaseRequest, status: int, seconds: float, level: int = logging.INFO) -> None:
        """Write the request's line. As JSON, its figures are fields."""
        path = request.rel_url.raw_path  # still percent-encoded: a path cannot forge a line
        line = f"{request.method} {path} {status} {1000 * seconds:.0f}ms [{self.request_id}]"
        fields: dict[str, object] = {
            "method": request.method,
            "path": path,
            "status": status,
            "seconds": seconds,
            "request_id": self.request_id,
        }
        if (user := request.get(USER)) is not None:
            line += f" user={user.name}"
            fields["user"] = user.name
        if self.response_id:
            line += f" {self.response_id} prompt={self.prompt_tokens} completion={self.completion_tokens}"
            fields |= {
                "response_id": self.response_id,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
            }
        if self.ttft is not None:
            line += f" ttft={1000 * self.ttft:.0f}ms"
            fields["ttft_seconds"] = self.ttft
        if self.prompts:
            line += f" asked={self.prompts!r}"
            fields["prompts"] = self.prompts
        logger.log(level, line, extra=fields)


_TRACE = web.RequestKey("trace", Trace)


def trace_of(request: web.BaseRequest) -> Trace:
    """The trace of a request; made when first asked for."""
    trace = request.get(_TRACE)
    if trace is None:
        wished = request.headers.get(REQUEST_ID_HEADER, "")
        trace = Trace(wished if _SANE_ID.fullmatch(wished) else uuid.uuid4().hex)
        request[_TRACE] = trace
    return trace


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every response carries the id of its request."""
    response.headers[REQUEST_ID_HEADER] = trace_of(request).request_id


@web.middleware
async def log_departures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log the requests that no answer ends, and that `AccessLogger` therefore never sees."""
    trace = trace_of(request)
    try:
        return await handler(request)
    except (asyncio.CancelledError, ConnectionError):
        trace.log(request, _CLIENT_CLOSED_REQUEST, time.monotonic() - trace.started)
        raise


class AccessLogger(AbstractAccessLogger):
    """One line for each request: method, path, status, time, id and user; for a generation also its tokens.

    Probes that find all well are for debugging only: they come every few seconds and say nothing.
    """

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        quiet = request.path in _PROBES and response.status == 200
        level = logging.DEBUG if quiet else logging.INFO
        trace_of(request).log(request, response.status, time, level)

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(logging.INFO)
