"""What is known of one HTTP request while it is served: its id, and what its log line and its span will say."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from aiohttp import web

REQUEST_ID_HEADER = "X-Request-Id"

IGNORED_HEADER = "X-Carousel-Ignored"
MAX_IGNORED = 1024
"""Characters of it."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """One request, from its headers to the end of its answer."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    response_id: str = ""
    """The id that the answer carries, where it carries one."""
    prompt_tokens: int = 0
    computed_tokens: int = 0
    """Those of them that are in the KV cache by now."""
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
    ignored: list[str] = field(default_factory=list)
    """Fields of the body that are not known here, as a header can have them."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Until the first token, and from there to now."""
        total = time.monotonic() - self.started
        first = min(total, self.ttft or total)
        return first, total - first


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
    """Signal handler: every response carries the id of its request, and what was left out of it."""
    record = record_of(request)
    response.headers[REQUEST_ID_HEADER] = record.request_id
    if record.ignored:
        response.headers[IGNORED_HEADER] = _shortened(record.ignored)


def _shortened(names: Sequence[str]) -> str:
    """Those of them that a header has room for."""
    room = accumulate(len(name) + len(", ") for name in names)
    told = [name for name, so_far in zip(names, room, strict=True) if so_far <= MAX_IGNORED]
    return ", ".join(told if len(told) == len(names) else [*told, "..."])
