"""What is left when nobody asks for anything any more, and what of it is wrong."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import psutil

from benchmarks.soak.clients import Soaked

SETTLE_SECONDS = 60.0
"""In which all that was begun has to be over, once nobody sends any more."""


@dataclass(frozen=True)
class Holding:
    """What the server and its engine hold when nobody asks for anything."""

    blocks: float
    running: float
    tasks: float
    descriptors: int
    threads: int
    megabytes: float
    """Of the server's process: the engine is another one after each kill."""


async def holding(soaked: Soaked) -> Holding:
    metric = soaked.server.metric
    process = psutil.Process(soaked.server.process.pid)
    return Holding(
        blocks=await metric("carousel_kv_cache_usage_ratio"),
        running=await metric("carousel_requests_running") + await metric("carousel_requests_waiting"),
        tasks=await metric("carousel_server_tasks"),
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        megabytes=process.memory_info().rss / 1e6,
    )


async def settled(soaked: Soaked) -> Holding:
    """When nothing runs any more, or it is too late for that."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(1)
        async with soaked.session() as session, session.get("/health/ready") as response:
            is_ready = response.status == 200
        held = await holding(soaked)
        if (is_ready and held.running == held.blocks == 0) or time.monotonic() > deadline:
            return held


async def ledger_of(soaked: Soaked) -> dict[str, int]:
    async with soaked.session() as session, session.get("/v1/usage") as response:
        total: dict[str, int] = (await response.json())["total"]
        return total


def report(
    soaked: Soaked, before: Holding, after: Holding, memory: list[float], ledger: dict[str, int]
) -> list[str]:
    for outcome, count in sorted(soaked.outcomes.items()):
        print(f"{count:7}  {outcome}")
    part = max(1, len(memory) // 5)
    first, last = statistics.median(memory[:part]), statistics.median(memory[-part:])
    growth = last / first - 1
    print(f"idle before: {before}")
    print(f"idle after:  {after}")
    print(f"memory of the server after warm-up: {first:.1f} MB, at the end {last:.1f} MB, {growth:+.1%}")
    told = {"prompt": ledger["prompt_tokens"], "completion": ledger["completion_tokens"]}
    print(f"the ledger has {told}, the clients counted {dict(soaked.counted)}")
    wrong = {
        "a request without an end": bool(soaked.without_end),
        "not refused, or 5xx": any(
            outcome.startswith(("not refused", "500", "502")) for outcome in soaked.outcomes
        ),
        "blocks held": after.blocks > 0 or after.running > 0,
        "tasks left": after.tasks > before.tasks,
        "descriptors left": after.descriptors > before.descriptors + 2,
        "threads left": after.threads > before.threads + 2,
        "memory grows": growth > 0.02,
        "the ledger is wrong": told != dict(soaked.counted),
    }
    for name, is_so in wrong.items():
        print(f"{'NO' if is_so else 'ok':3} {name}")
    for each in soaked.without_end[:10]:
        print(f"    without an end: {each}")
    return [name for name, is_so in wrong.items() if is_so]
