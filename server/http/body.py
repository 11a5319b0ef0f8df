"""Reads a request's body: so many bytes of it, and for so long, at most."""

from __future__ import annotations

import asyncio

from aiohttp import web

from scheduler.engine.client import AsyncEngine
from server.app_keys import CONFIG, ENGINE
from server.config import MAX_BODY_BYTES, MIN_BODY_BYTES
from server.http.errors import ApiError

ESCAPED = 6
r"""Bytes that JSON takes for one character at most (\u00e9; outside of the basic plane it is two of them)."""

LISTS = 2
"""How much longer than one prompt as long as can be a list of several may be."""


def body_limit(engine: AsyncEngine) -> int:
    """Bytes that a request's body may have: what the longest sequence takes if all its tokens are the longest."""
    longest = engine.info.max_model_len * engine.tokenizer.longest_token * ESCAPED * LISTS
    return max(MIN_BODY_BYTES, min(longest, MAX_BODY_BYTES))


async def read_body(request: web.Request) -> bytes:
    """The body as it was sent. Raises `ApiError` if it is too long or does not come."""
    limit = body_limit(request.app[ENGINE])
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    seconds = request.app[CONFIG].slow_body_seconds
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request body did not arrive within {seconds:g} s",
            type="timeout",
            code="body_timeout",
            headers={"Connection": "close"},
        ) from None
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request body is larger than {limit / 1024**2:.3g} MiB, more than a prompt for this model can take",
        code="body_too_large",
    )
