"""One load on the shared server, watched by a real Prometheus where there is one."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio

from scheduler.config import DEFAULT_MODEL
from server.bench.load import LoadClient, RunResult
from server.bench.workload import make_requests
from tests.dashboards.exposition import Exposition
from tests.dashboards.prometheus import Prometheus, scraping
from tests.server.serving import Server


@dataclass(frozen=True)
class Load:
    """What clients and the server noted of the same few seconds."""

    result: RunResult
    before: Exposition
    after: Exposition
    start: float
    end: float
    """In Unix time."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus | None]:
    """It has scraped the server before the load begins; None where it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    with scraping(server.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")) as prometheus:
        await prometheus.until_ready()
        await prometheus.until('up{job="carousel"} == 1')
        yield prometheus


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def load(server: Server, prometheus: Prometheus | None) -> Load:
    """Eight clients for a few seconds, whose prompts begin alike; and a request that is refused."""
    status, _ = await server.post("/v1/completions", {"prompt": "Soon", "max_tokens": 1, "timeout": 1e-6})
    assert status == 408
    if prometheus is not None:  # a rate needs two scrapes of a series
        await prometheus.until("count_over_time(carousel_refusals_total[1m]) >= 2")
    requests = make_requests("shared-prefix", 16, seed=0)
    before, start = await exposition(server), time.time()
    result = await LoadClient(server.url, DEFAULT_MODEL, timeout=60).closed_loop(requests, 8)
    end, after = time.time(), await exposition(server)
    assert [outcome.error for outcome in result.outcomes if outcome.error] == []
    if prometheus is not None:  # the last figures are scraped, and the rules have seen them
        await prometheus.until(f"timestamp(model:carousel_late_tokens:ratio_rate5m) > {end + 1}")
    return Load(result, before, after, start, end)


async def exposition(server: Server) -> Exposition:
    async with aiohttp.ClientSession() as session, session.get(server.url + "/metrics") as response:
        return Exposition(await response.text())
