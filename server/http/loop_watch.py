"""How the server's event loop does: every stream waits while it is late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, Histogram

from scheduler import garbage
from server.http.draining import DRAINING

SECONDS = 0.05
"""Between two looks."""

COUNT_EVERY = 20
"""Looks between two counts of the tasks, each of which is looked at."""

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class EventLoopWatch:
    """Two metrics: by how much the loop is late, and how many tasks it has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "carousel_event_loop_lag_seconds",
            "How late the server's event loop comes to what is due: streams wait for it.",
            registry=registry,
            buckets=_BUCKETS,
        )
        self._tasks = Gauge("carousel_server_tasks", "Tasks of the server's event loop.", registry=registry)

    async def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        """For `cleanup_ctx`."""
        watching = asyncio.create_task(self._watch(app))
        yield
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    async def _watch(self, app: web.Application) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._tasks.set(len(asyncio.all_tasks()))
            garbage.collect(is_idle=app[DRAINING].is_idle)
            for _ in range(COUNT_EVERY):
                due = loop.time() + SECONDS
                await asyncio.sleep(SECONDS)
                self._lag.observe(max(0.0, loop.time() - due))
