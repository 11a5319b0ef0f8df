"""Cross-origin requests: pages of the origins that the operator names may call this server from a browser.

A few headers, and an answer to the browser's question before a request (the fetch standard's preflight).
aiohttp-cors would have every route registered with it; what is allowed here is the same for all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from server.http.errors import ApiError

METHODS = "GET, POST, DELETE, OPTIONS"
SECONDS = "600"
"""How long a browser may remember the answer."""

PRIVATE_NETWORK = "Private-Network"
"""What browsers ask for a page of the internet that calls a server on this machine, or near it (the draft of
private network access)."""


class CrossOrigin:
    """For the origins in `named`, with commas between them; `*` is all."""

    def __init__(self, named: str) -> None:
        self._origins = {origin.strip().rstrip("/") for origin in named.split(",") if origin.strip()}

    def _allows(self, request: web.BaseRequest) -> str | None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and ("*" in self._origins or origin in self._origins):
            return origin
        return None

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def answer_preflights(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method != hdrs.METH_OPTIONS or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
                return await handler(request)
            if self._allows(request) is None:
                raise ApiError(403, "pages of this origin may not call this server: see --cors-origins")
            headers: dict[str, str] = {
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: METHODS,
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, ""),
                hdrs.ACCESS_CONTROL_MAX_AGE: SECONDS,
            }
            if request.headers.get(f"Access-Control-Request-{PRIVATE_NETWORK}") == "true":
                headers[f"Access-Control-Allow-{PRIVATE_NETWORK}"] = "true"
            return web.Response(status=204, headers=headers)

        return answer_preflights

    @property
    def on_prepare(self) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
        async def allow(request: web.Request, response: web.StreamResponse) -> None:
            """Signal handler: also of errors and of streams, or the page could not read them."""
            if (origin := self._allows(request)) is not None:
                response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
                response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "*"
                response.headers.add(hdrs.VARY, hdrs.ORIGIN)

        return allow


def is_preflight(request: web.BaseRequest) -> bool:
    return request.method == hdrs.METH_OPTIONS
