"""What answers while the engine starts for the first time: that it does."""

from __future__ import annotations

from aiohttp import web

from server.api.health import live
from server.http.draining import unready
from server.http.errors import error_response


def create_starting_app(root_path: str) -> web.Application:
    """An application that lives, and is ready for nothing."""
    app = web.Application()
    for root in {"", root_path}:
        app.router.add_get(f"{root}/health/live", live)
    app.router.add_route("*", "/{path:.*}", _starting)
    return app


async def _starting(request: web.Request) -> web.Response:
    refusal = unready("the engine is starting", "engine_starting")
    answer = error_response(refusal, request)
    answer.force_close()  # the next request is for another application
    return answer
