"""Chaos for half an hour: everything that clients and machines do to a server, at once, and what is left of it.

    python -m benchmarks.soak

A real server with the default model and users. Workers ask all endpoints; others cancel, disconnect, read slowly,
send what makes no sense, and come in bursts; the engine is killed, a user is disabled and enabled, and the file
system of the ledger is full for a while (a small tmpfs, where this process may mount one). At the end nothing may
be left: every request that was accepted got an end, no block, task, descriptor or thread is held, memory has not
grown, and the ledger has what the clients counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.own_server import own_server
from benchmarks.soak.clients import (
    Soaked,
    again_and_again,
    burst,
    disconnects,
    guest,
    makes_no_sense,
    other_endpoints,
    reads_slowly,
    well_behaved,
)
from benchmarks.soak.machine import edit_users, every, fill_disk, kill_engine, small_disk
from benchmarks.soak.remains import ledger_of, report, settled

WARM_UP = 0.3
"""Share of the time after which memory is looked at for the first time."""

KILL_EVERY, EDIT_EVERY, BURST_EVERY, FILL_EVERY = 45.0, 7.0, 13.0, 60.0
"""Seconds."""


async def run(soaked: Soaked, minutes: float, has_small_disk: bool) -> list[str]:
    """Returns what is wrong in the end."""
    await asyncio.gather(*(well_behaved(soaked) for _ in range(8)))
    end = time.monotonic() + 60 * minutes
    before = await settled(soaked)
    workers = [
        *(again_and_again(well_behaved, soaked, end, 0.2) for _ in range(12)),
        *(again_and_again(disconnects, soaked, end, 0.5) for _ in range(4)),
        *(again_and_again(reads_slowly, soaked, end, 0.5) for _ in range(3)),
        *(again_and_again(makes_no_sense, soaked, end, 0.3) for _ in range(2)),
        *(again_and_again(other_endpoints, soaked, end, 0.3) for _ in range(3)),
        again_and_again(guest, soaked, end, 1.0),
        again_and_again(burst, soaked, end, 2 * BURST_EVERY),
        every(min(KILL_EVERY, 15 * minutes), end, lambda: kill_engine(soaked)),
        every(EDIT_EVERY, end, lambda: edit_users(soaked)),
    ]
    if has_small_disk:
        workers.append(every(min(FILL_EVERY, 20 * minutes), end, lambda: fill_disk(soaked)))
    memory: list[float] = []

    async def look() -> None:
        started = time.monotonic()
        with tqdm(total=round(60 * minutes), desc="soaking", unit="s", file=sys.stderr) as bar:
            while (now := time.monotonic()) < end:
                bar.update(round(now - started) - bar.n)
                if now - started > WARM_UP * 60 * minutes:
                    memory.append(psutil.Process(soaked.server.process.pid).memory_info().rss / 1e6)
                await asyncio.sleep(1)

    await asyncio.gather(look(), *workers)
    after = await settled(soaked)
    ledger = await ledger_of(soaked)
    return report(soaked, before, after, memory, ledger)


@contextlib.contextmanager
def soaked_server() -> Iterator[tuple[Soaked, bool]]:
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        small_disk(small := Path(scratch) / "small") as is_mounted,
    ):
        flags = ["--ledger", f"{small}/ledger.sqlite3", "--kv-cache-memory", "64MB"]
        with own_server(*flags, users=dict.fromkeys(("steady", "rude", "guest"), 1.0)) as server:
            yield Soaked(server, small), is_mounted
            for line in server.log.splitlines():
                if "Traceback" in line or " ERROR " in line:
                    print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    args = parser.parse_args()
    with soaked_server() as (soaked, is_mounted):
        wrong = asyncio.run(run(soaked, args.minutes, is_mounted))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
