"""Lets requests in, within the users' limits, and tells in each answer's headers what is left of them."""

from __future__ import annotations

from functools import wraps

from aiohttp import web
from aiohttp.typedefs import Handler

from server.app_keys import ADMISSION, LIMITS, user_of


def admitted(handler: Handler) -> Handler:
    """Decorator: a request over a limit is refused before anything of it is read."""

    @wraps(handler)
    async def admit(request: web.Request) -> web.StreamResponse:
        with request.app[LIMITS].admit(user_of(request)) as request[ADMISSION]:
            return await handler(request)

    return admit


async def tell_limits(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: an answer to an admitted request carries what is left of its user's limits."""
    if (admission := request.get(ADMISSION)) is not None:
        response.headers.update(admission.headers())
