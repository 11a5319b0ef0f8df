"""GET /metrics. Whoever may read it without a key learns no user's name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from scheduler.observing.metrics import OTHER
from server.config import ServeConfig
from server.http.errors import answer_errors
from server.http.guard import guard

REGISTRY = web.AppKey("registry", CollectorRegistry)
SCRAPE = web.AppKey("scrape", asyncio.Lock)
"""Held by the one that is in progress."""


class _Numbered(Collector):
    """The metrics of a registry with numbers in the place of users, in the order in which they appeared."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._numbers = {OTHER: OTHER}

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "user": self._number(sample.labels["user"])})
                if "user" in sample.labels
                else sample
                for sample in family.samples
            ]
            yield family

    def _number(self, user: str) -> str:
        return self._numbers.setdefault(user, str(len(self._numbers)))


def without_names(registry: CollectorRegistry) -> CollectorRegistry:
    """A registry with the same metrics, in which users are numbers."""
    numbered = CollectorRegistry()
    numbered.register(_Numbered(registry))
    return numbered


def add_metrics(app: web.Application, registry: CollectorRegistry) -> None:
    """Put /metrics into an application."""
    app[REGISTRY] = registry
    app[SCRAPE] = asyncio.Lock()
    app.router.add_get("/metrics", get_metrics)


def create_metrics_app(config: ServeConfig, registry: CollectorRegistry) -> web.Application:
    """The application of a port with nothing but /metrics, for the operator: it names the users."""
    checks = guard(config.metrics_host, config.allowed_hosts, has_keys=False)
    app = web.Application(middlewares=[answer_errors, checks])
    add_metrics(app, registry)
    return app


async def get_metrics(request: web.Request) -> web.Response:
    """Takes some 30 ms with a hundred users: in a thread, and one at a time, so that streams go on."""
    encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
    async with request.app[SCRAPE]:
        body = await asyncio.to_thread(encoder, request.app[REGISTRY])
    return web.Response(body=body, headers={"Content-Type": content_type})
