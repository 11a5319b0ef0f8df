"""What being watched costs: throughput with metrics scraped and the live page's stream open, against neither.

python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from tqdm import tqdm

from benchmarks.asked import asked
from benchmarks.own_server import OwnServer, own_server
from server.bench.report import throughput

CONCURRENCY = 32


@asynccontextmanager
async def watched(server: OwnServer) -> AsyncIterator[None]:
    """Read /metrics every second, as Prometheus would, and the live page's frames as they come."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def scrape() -> None:
            while True:
                async with session.get(server.metrics_url) as response:
                    await response.read()
                await asyncio.sleep(1)

        async def look() -> None:
            async with session.get(server.url + "/live") as response:
                async for _ in response.content:
                    pass

        tasks = [asyncio.create_task(scrape()), asyncio.create_task(look())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def turn(server: OwnServer, seed: int, *, on: bool) -> float:
    requests = asked(6 * CONCURRENCY, seed=seed)
    async with watched(server) if on else contextlib.nullcontext():
        result = await server.chats().closed_loop(requests, CONCURRENCY)
    return throughput(result.outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default: 6)")
    args = parser.parse_args()
    ratios, rates = [], []
    with own_server("--no-prefix-caching") as server:  # the same requests cost the same the second time
        asyncio.run(turn(server, 999, on=False))
        for number in tqdm(range(args.rounds), desc="watched and not", unit="round"):
            order = (True, False) if number % 2 else (False, True)
            rate = {on: asyncio.run(turn(server, number, on=on)) for on in order}
            rates.append(rate[False])
            ratios.append(rate[True] / rate[False])
    print(f"C={CONCURRENCY}, not watched: {statistics.median(rates):.0f} tok/s")
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"watched / not watched, the same requests: {statistics.median(ratios):.3f} (of {each})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
