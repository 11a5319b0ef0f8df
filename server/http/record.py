"""What is known of one HTTP request while it is served: its id, and what its log line and its span will say."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field

from aiohttp import web

REQUEST_ID_HEADER = "X-Request-Id"

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """One request, from its headers to the end of its answer."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    response_id: str = ""
    """The id that the answer carries, where it carries one."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    """Guessed for it."""
    accepted_tokens: int = 0
    """Those among them that were right."""
    ttft: float | None = None
    """Seconds to the first token."""
    prompts: list[str] = field(default_factory=list)
    """What was asked, if it is to be logged."""


_RECORD = web.RequestKey("record", RequestRecord)


def record_of(request: web.BaseRequest) -> RequestRecord:
    """The record of a request; made when first asked for."""
    record = request.get(_RECORD)
    if record is None:
        wished = request.headers.get(REQUEST_ID_HEADER, "")
        record = RequestRecord(wished if _SANE_ID.fullmatch(wished) else uuid.uuid4().hex)
        request[_RECORD] = record
    return record


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every response carries the id of its request."""
    response.headers[REQUEST_ID_HEADER] = record_of(request).request_id
