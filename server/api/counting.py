"""What the endpoints share that tell what the model makes of a text, and generate nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
from aiohttp import web

from server.app_keys import LIMITS, user_of
from server.http.body import body_of
from server.http.json import json_response
from server.http.record import RequestRecord, record_of
from server.http.worker import work

Task = Callable[[web.Application, RequestRecord, bytes], msgspec.Struct]


async def counted(request: web.Request, task: Task) -> web.Response:
    """Read the body and answer what `task` makes of it. Raises `LimitExceededError` over the user's limit of such
    requests."""
    app, user = request.app, user_of(request)
    app[LIMITS].count(user)
    async with body_of(request) as body:
        return json_response(await work(app, user.name, len(body), partial(task, app, record_of(request), body)))
