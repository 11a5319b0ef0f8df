"""What the handlers share, under typed keys of the application and of the request."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry

from scheduler.async_engine import AsyncEngine
from server.config import ServeConfig
from server.ledger import Ledger
from server.limits import Admission, Limits
from server.live import Live
from server.users import ANONYMOUS, User, UserDirectory

CONFIG = web.AppKey("config", ServeConfig)
ENGINE = web.AppKey("engine", AsyncEngine)
LEDGER = web.AppKey("ledger", Ledger)
LIMITS = web.AppKey("limits", Limits)
LIVE = web.AppKey("live", Live)
REGISTRY = web.AppKey("registry", CollectorRegistry)
STARTED = web.AppKey("started", int)
"""Unix time."""
USERS = web.AppKey("users", UserDirectory)
"""Only on a server with users."""

ADMISSION = web.RequestKey("admission", Admission)
USER = web.RequestKey("user", User)
"""Only on a server with users, and not before the key was found to be theirs."""


def user_of(request: web.BaseRequest) -> User:
    user: User = request.get(USER, ANONYMOUS)
    return user
