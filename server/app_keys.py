"""What the handlers share, under typed keys of the application and of the request."""

from __future__ import annotations

from aiohttp import web

from scheduler.client.async_engine import AsyncEngine
from server.config import ServeConfig
from server.users.directory import ANONYMOUS, User, UserDirectory
from server.users.ledger import Ledger
from server.users.limits import Admission, Limits

CONFIG = web.AppKey("config", ServeConfig)
ENGINE = web.AppKey("engine", AsyncEngine)
LEDGER = web.AppKey("ledger", Ledger)
LIMITS = web.AppKey("limits", Limits)
BACKGROUND_LIMITS = web.AppKey("background_limits", Limits)
"""Of what no connection waits for."""
USERS = web.AppKey("users", UserDirectory)
"""Only on a server with users."""

ADMISSION = web.RequestKey("admission", Admission)
USER = web.RequestKey("user", User)
"""Only on a server with users, and not before the key was found to be theirs."""


def user_of(request: web.BaseRequest) -> User:
    user: User = request.get(USER, ANONYMOUS)
    return user
