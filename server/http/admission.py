"""Tells in each answer's headers what is left of its user's limits."""

from __future__ import annotations

from aiohttp import web

from server.app_keys import ADMISSION


async def tell_limits(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: an answer to an admitted request carries what is left of its user's limits."""
    if (admission := request.get(ADMISSION)) is not None:
        response.headers.update(admission.headers())
