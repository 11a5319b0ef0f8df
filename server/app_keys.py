"""What the handlers share, under typed keys of the application."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry

from scheduler.async_engine import AsyncEngine
from server.config import ServeConfig

CONFIG = web.AppKey("config", ServeConfig)
ENGINE = web.AppKey("engine", AsyncEngine)
REGISTRY = web.AppKey("registry", CollectorRegistry)
STARTED = web.AppKey("started", int)
"""Unix time."""
