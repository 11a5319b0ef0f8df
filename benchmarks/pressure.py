"""A well-behaved stream beside each hostile request: what that is answered, and what the stream notices.

python -m benchmarks.pressure                    # every case, about twenty minutes
python -m benchmarks.pressure --only messages    # those whose names contain it

Prints for each the answer and its time, the largest gap between two tokens of the stream while the case went on,
how much more that is than in as long a time without one, and by how much server and engine have grown by its end.
A machine that is shared with others stands still at times, and the largest gap is what such a moment makes of it:
so each case is run three times, and the medians count.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import aiohttp
from tqdm import tqdm

from benchmarks.attacks import ALL, attack, prepare
from benchmarks.hostile import Result, Target
from benchmarks.own_server import OwnServer, own_server

GUEST, HOSTILE = "guest", "hostile"
NUM_OTHERS = 98
CONTROL_SECONDS = 10.0
SETTLE_SECONDS = 1.0
"""After a case, until memory is looked at: what was freed is freed by then."""

POOL_TOKENS = 12_000
FLAGS = (
    *("--stalled-stream-seconds", "5", "--slow-body-seconds", "5"),
    *("--kv-cache-memory", "256MiB"),  # small, so that all of it has been used before memory is looked at
)


@dataclass(slots=True)
class Stream:
    """When the pieces of the guest's answers came."""

    arrivals: list[float] = field(default_factory=list)

    def largest_gap(self, start: float, end: float) -> float:
        """Seconds between two pieces, of those that reach into this time."""
        times = pairwise([*self.arrivals, end])
        return max((after - before for before, after in times if after > start), default=0.0)


@asynccontextmanager
async def well_behaved(server: OwnServer) -> AsyncIterator[Stream]:
    """A user whose stream goes on and on."""
    stream, begun = Stream(), asyncio.Event()
    body = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "stream": True}

    async def read() -> None:
        headers = {"Authorization": f"Bearer {server.keys[GUEST]}"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as session:
            while True:
                async with session.post(server.url + "/v1/completions", json=body) as response:
                    response.raise_for_status()
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            stream.arrivals.append(time.perf_counter())
                            begun.set()

    reading = asyncio.create_task(read())
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait([reading, waiting], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield stream
    finally:
        waiting.cancel()
        reading.cancel()
        done = await asyncio.gather(reading, return_exceptions=True)
        if not isinstance(done[0], asyncio.CancelledError):
            raise RuntimeError(f"the well-behaved stream ended: {done[0]!r}")


async def run_case(server: OwnServer, case: str, workers: ProcessPoolExecutor) -> tuple[Result, float, int]:
    """What the case was answered, the stream's largest gap in seconds, and the growth in bytes."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(workers, prepare, case)
    before = server.memory()
    async with well_behaved(server) as stream:
        start = time.perf_counter()
        target = Target(server.url, server.metrics_url, server.keys[HOSTILE], server.keys[GUEST])
        result = await loop.run_in_executor(workers, attack, case, target)
        await asyncio.sleep(SETTLE_SECONDS)
        gap = stream.largest_gap(start, time.perf_counter())
        return result, gap, server.memory() - before


async def warm(server: OwnServer) -> None:
    """All users have been here, and all blocks have been used."""
    length = POOL_TOKENS // len(server.keys)
    async with aiohttp.ClientSession() as session:
        for number, key in enumerate(server.keys.values()):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": [100 + number] * length, "max_tokens": 1}
            async with session.post(f"{server.url}/v1/completions", json=body, headers=headers) as response:
                response.raise_for_status()


async def quiet(server: OwnServer) -> float:
    """The stream's largest gap in seconds where nobody is hostile."""
    async with well_behaved(server) as stream:
        start = time.perf_counter()
        await asyncio.sleep(CONTROL_SECONDS)
        return stream.largest_gap(start, time.perf_counter())


async def run(server: OwnServer, cases: list[str], rounds: int, workers: ProcessPoolExecutor) -> None:
    await warm(server)
    control = median([await quiet(server) for _ in range(rounds)])
    first = server.memory()
    print(f"largest gap without a hostile request: {1000 * control:.0f} ms; memory: {first / 2**20:.0f} MiB")
    print(f"{'case':44} {'answer':64} {'after':>8} {'gap':>9} {'more':>9} {'memory':>11}")
    for case in tqdm(cases, unit="case"):
        results, gaps, growths = zip(*[await run_case(server, case, workers) for _ in range(rounds)], strict=True)
        gap, seconds = median(gaps), median(result.seconds for result in results)
        tqdm.write(
            f"{case:44} {results[-1].answer:64} {seconds:6.2f} s {1000 * gap:6.0f} ms "
            f"{1000 * (gap - control):+6.0f} ms {sum(growths) / 2**20:+7.0f} MiB",
            file=sys.stdout,
        )
    lag = await server.buckets("carousel_event_loop_lag_seconds")
    total = max(lag.values())
    shares = ", ".join(
        f"{100 * lag[bound] / total:.1f} % within {1000 * bound:.0f} ms" for bound in (0.01, 0.05, 0.25)
    )
    print(f"the event loop was late {total:.0f} times: {shares}")
    print(f"memory in the end: {(server.memory() - first) / 2**20:+.0f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the cases whose names contain this (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run (default: 3)")
    args = parser.parse_args()
    cases = [case for case in ALL if args.only in case]
    users = dict.fromkeys([GUEST, HOSTILE, *(f"user{number}" for number in range(NUM_OTHERS))], 1.0)
    # Built before anything runs, in one process, which stays.
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as workers,
        tempfile.TemporaryDirectory() as kept,
        own_server(*FLAGS, "--store", f"{kept}/store", "--batches", f"{kept}/batches", users=users) as server,
    ):
        asyncio.run(run(server, cases, args.rounds, workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
