"""Whose request it is: the user whose key it carries."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from server.app_keys import CONFIG, USER, USERS
from server.http.errors import ApiError

_OPEN_PATHS = frozenset(
    {"", "/", "/health", "/health/live", "/health/ready", "/metrics", "/ping", "/version", "/openapi.json"}
)
_PAGE_FILES = "/page/"


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put the user on the request, or refuse it. Probes and the page for people need no key."""
    path = request.path.removeprefix(request.app[CONFIG].root_path)
    if path in _OPEN_PATHS or path.startswith(_PAGE_FILES):
        return await handler(request)
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if not key and (key := request.headers.get("X-Api-Key", "")):  # as Anthropic's clients send it
        scheme = "bearer"
    if scheme.lower() != "bearer" or not key.strip():
        raise _unauthorized("this server needs a key: send it as `Authorization: Bearer sk-carousel-...`")
    user = request.app[USERS].find(key.strip())
    if user is None:
        raise _unauthorized("the key is not known here; whoever runs this server gives out keys")
    request[USER] = user
    if user.disabled:
        raise _unauthorized(f"the user {user.name} is disabled")
    return await handler(request)


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}, rejection="unauthorized"
    )
