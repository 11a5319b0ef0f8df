"""POST /v1/trace: the next steps as Chrome trace events, to be opened in Perfetto."""

from __future__ import annotations

import asyncio

from aiohttp import web

from scheduler.core.request import InvalidRequestError
from server.app_keys import CONFIG, ENGINE
from server.http.errors import ApiError
from server.validation import count_of

MAX_STEPS = 10_000

AT_ONCE = 4
"""Each is told of every step."""

TRACES = web.AppKey("traces", asyncio.Semaphore)
"""Held by those that are being recorded."""


async def record_trace(request: web.Request) -> web.Response:
    """Answers when `steps` steps (200 if not said) are done. Not with users: a trace names who else was served."""
    if request.app[CONFIG].users is not None:
        raise ApiError(403, "with users on, traces are the operator's: start the server with --trace FILE")
    asked = request.query.get("steps", "200")
    if (steps := count_of(asked, MAX_STEPS)) is None:
        raise InvalidRequestError(f"steps should be a number from 1 to {MAX_STEPS}, got {asked[:20]!r}", "steps")
    traces = request.app[TRACES]
    if traces.locked():
        message = f"{AT_ONCE} traces are recorded already, as many as there may be at a time"
        raise ApiError(429, message, type="server_busy", code="too_many_traces", headers={"Retry-After": "1"})
    async with traces:
        events = await request.app[ENGINE].record_trace(steps)
    headers = {"Content-Disposition": 'attachment; filename="carousel-trace.json"'}
    return web.Response(body=events, content_type="application/json", headers=headers)
