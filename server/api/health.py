"""Whether the server lives, and whether it can serve: they are two questions."""

from __future__ import annotations

from aiohttp import web

from scheduler.client.async_engine import EngineDeadError, Phase
from server.api.completion_objects import Health
from server.app_keys import ENGINE
from server.http.draining import DRAINING, unready
from server.http.json import json_response


async def live(request: web.Request) -> web.Response:
    """200 while this process answers: whoever restarts what does not, has nothing to do."""
    return json_response(Health("ok"))


async def ready(request: web.Request) -> web.Response:
    """200 while requests are served at once; 503 with the reason while the engine starts, when it is gone, and
    when the server is about to end."""
    if request.app[DRAINING].has_begun:
        raise unready("the server is shutting down", "shutting_down")
    engine = request.app[ENGINE]
    if (reason := engine.error) is not None:
        if engine.phase is Phase.STARTING:
            raise unready(reason, "engine_starting")
        raise EngineDeadError(reason)
    return json_response(Health("ok"))
