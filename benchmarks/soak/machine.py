"""What the machine does to the server that is soaked: its engine is killed, its users change, its disk is full."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from benchmarks.soak.clients import Soaked
from server.users.file import set_disabled


async def every(seconds: float, end: float, act: Callable[[], Awaitable[None]]) -> None:
    while time.monotonic() + seconds < end:
        await asyncio.sleep(seconds)
        await act()


async def kill_engine(soaked: Soaked) -> None:
    engine = soaked.server.engine()
    if engine is not None:
        engine.send_signal(soaked.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
        soaked.outcomes["engine killed"] += 1


async def edit_users(soaked: Soaked) -> None:
    await asyncio.to_thread(set_disabled, soaked.server.users_file, "guest", soaked.random.random() < 0.5)


async def fill_disk(soaked: Soaked) -> None:
    """For a few seconds nothing can be written to the ledger's file system."""
    waste = soaked.small / "waste"

    def fill() -> None:
        with contextlib.suppress(OSError), waste.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    await asyncio.to_thread(fill)
    soaked.outcomes["disk filled"] += 1
    await asyncio.sleep(8)
    await asyncio.to_thread(waste.unlink, missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A small file system, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        print("no tmpfs can be mounted here: the disk is never full", file=sys.stderr)
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
