"""The one line that each request leaves in the log. Not what was said, unless asked to."""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler

from server.app_keys import USER
from server.http.record import record_of

_PROBES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
_NO_HTTP = "UNKNOWN"
"""What aiohttp gives for the method of a message that it cannot read."""
_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that did not wait for the answer; it is only ever logged."""

logger = logging.getLogger(__name__)


def _write(request: web.BaseRequest, status: int, seconds: float, level: int = logging.INFO) -> None:
    """Write a request's line. As JSON, its figures are fields."""
    record = record_of(request)
    path = request.rel_url.raw_path  # still percent-encoded: a path cannot forge a line
    line = f"{request.method} {path} {status} {1000 * seconds:.0f}ms [{record.request_id}]"
    fields: dict[str, object] = {
        "method": request.method,
        "path": path,
        "status": status,
        "seconds": seconds,
        "request_id": record.request_id,
    }
    if (user := request.get(USER)) is not None:
        line += f" user={user.name}"
        fields["user"] = user.name
    if record.response_id:
        line += f" {record.response_id} prompt={record.prompt_tokens} completion={record.completion_tokens}"
        fields |= {
            "response_id": record.response_id,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
        }
    if record.ttft is not None:
        line += f" ttft={1000 * record.ttft:.0f}ms"
        fields["ttft_seconds"] = record.ttft
    if record.prompts:
        line += f" asked={record.prompts!r}"
        fields["prompts"] = record.prompts
    logger.log(level, line, extra=fields)


@web.middleware
async def log_departures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log the requests that no answer ends, and that `AccessLogger` therefore never sees."""
    record = record_of(request)
    try:
        return await handler(request)
    except (asyncio.CancelledError, ConnectionError):
        _write(request, _CLIENT_CLOSED_REQUEST, time.monotonic() - record.started)
        raise


class AccessLogger(AbstractAccessLogger):
    """One line for each request: method, path, status, time, id and user; for a generation also its tokens.

    Probes that find all well are for debugging only: they come every few seconds and say nothing.
    """

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        if request.method == _NO_HTTP and not request.headers:
            return  # `ConnectionLog` has it
        quiet = request.path in _PROBES and response.status == 200
        _write(request, response.status, time, logging.DEBUG if quiet else logging.INFO)

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(logging.INFO)
