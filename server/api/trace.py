"""POST /v1/trace: the next steps as Chrome trace events, to be opened in Perfetto."""

from __future__ import annotations

from aiohttp import web

from scheduler.sampling_params import InvalidRequestError
from server.app_keys import CONFIG, ENGINE
from server.http.errors import ApiError

MAX_STEPS = 10_000


async def record_trace(request: web.Request) -> web.Response:
    """Answers when `steps` steps (200 if not said) are done. Not with users: a trace names who else was served."""
    if request.app[CONFIG].users is not None:
        raise ApiError(403, "with users on, traces are the operator's: start the server with --trace FILE")
    asked = request.query.get("steps", "200")
    if not (asked.isdecimal() and 1 <= int(asked) <= MAX_STEPS):
        raise InvalidRequestError(f"steps should be a number from 1 to {MAX_STEPS}, got {asked[:20]!r}", "steps")
    events = await request.app[ENGINE].record_trace(int(asked))
    headers = {"Content-Disposition": 'attachment; filename="carousel-trace.json"'}
    return web.Response(body=events, content_type="application/json", headers=headers)
