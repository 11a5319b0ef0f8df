"""Reads a request's body: so many bytes of it, for so long, and only while there is room for it among all."""

from __future__ import annotations

import asyncio
import codecs
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from scheduler.client.async_engine import AsyncEngine
from server.app_keys import CONFIG, ENGINE, user_of
from server.config import MAX_BODY_BYTES, MIN_BODY_BYTES
from server.http.errors import ApiError

ESCAPED = 6
r"""Bytes that JSON takes for one character at most (\u00e9; outside of the basic plane it is two of them)."""

LISTS = 2
"""How much longer than one prompt as long as can be a list of several may be."""

LARGEST_AT_ONCE = 8
"""Bodies as large as they may be that there is room for at a time."""


class BodyRoom:
    """Bytes of the bodies that are kept at a time, from their first byte until they are understood. When there is
    no more room, each of the N users who have something in it has an Nth of it, as in the queue (users/limits.py):
    refused is who would hold more."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @contextmanager
    def place(self, user: str) -> Iterator[BodyPlace]:
        """For one body."""
        place = BodyPlace(self, user)
        try:
            yield place
        finally:
            self.take(user, -place.num_bytes, 0)

    def take(self, user: str, num_bytes: int, limit: int) -> None:
        """So much more (less, if negative). Raises `ApiError` where it does not fit."""
        held = self._held[user] + num_bytes
        others = len(self._held) - (user in self._held)
        if num_bytes > 0 and self._held.total() + num_bytes > limit and held > limit / (others + 1):
            raise ApiError(
                429,
                f"{self._held.total() / 1024**2:.0f} MiB of request bodies wait to be read, and your part of them "
                "is as large as it may be: try again in a moment",
                type="server_busy",
                code="bodies_full",
                headers={"Retry-After": "1", "Connection": "close"},
                rejection="bodies",
            )
        self._held[user] = held
        if held == 0:
            del self._held[user]


class BodyPlace:
    """What one body takes of the room."""

    def __init__(self, room: BodyRoom, user: str) -> None:
        self._room = room
        self._user = user
        self.num_bytes = 0

    def take(self, num_bytes: int, limit: int) -> None:
        """Raises `ApiError` where all bodies together may not have more than `limit`."""
        self._room.take(self._user, num_bytes, limit)
        self.num_bytes += num_bytes


BODIES = web.AppKey("bodies", BodyRoom)


def body_limit(engine: AsyncEngine) -> int:
    """Bytes that a request's body may have: what the longest sequence takes if all its tokens are the longest."""
    longest = engine.info.max_model_len * engine.tokenizer.longest_token * ESCAPED * LISTS
    return max(MIN_BODY_BYTES, min(longest, MAX_BODY_BYTES))


@asynccontextmanager
async def body_of(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it was sent, but for a mark of its byte order. It has its place among all others within this.
    Raises `ApiError` if it is too long, does not come, or has no place."""
    limit = body_limit(request.app[ENGINE])
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    with request.app[BODIES].place(user_of(request).name) as place:
        async with in_time(request):
            body = await _read(request, place, limit)
        yield body


async def _read(request: web.Request, place: BodyPlace, limit: int) -> bytes:
    chunks: list[bytes] = []
    async for chunk in request.content.iter_any():
        place.take(len(chunk), LARGEST_AT_ONCE * limit)
        chunks.append(chunk)
        if place.num_bytes > limit:
            raise _too_large(limit)
    return b"".join(chunks).removeprefix(codecs.BOM_UTF8)  # put together once: to let it grow is to copy it again


@asynccontextmanager
async def in_time(request: web.Request) -> AsyncIterator[Patience]:
    """While a body is read. Raises `ApiError` if it does not come."""
    seconds = request.app[CONFIG].slow_body_seconds
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield Patience(timeout, seconds)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request body did not arrive within {seconds:g} s",
            type="timeout",
            code="body_timeout",
            headers={"Connection": "close"},
        ) from None


class Patience:
    """How long a body is waited for."""

    def __init__(self, timeout: asyncio.Timeout, seconds: float) -> None:
        self._timeout = timeout
        self._seconds = seconds

    def renew(self) -> None:
        """As long again, from now on: of a body that is longer than a request's, so much has come."""
        self._timeout.reschedule(asyncio.get_running_loop().time() + self._seconds)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request body is larger than {limit / 1024**2:.3g} MiB, more than a prompt for this model can take",
        code="body_too_large",
    )
