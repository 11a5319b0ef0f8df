"""How a command ends: its exit status, and what it says on the way out."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from server.event_loop import new_event_loop

FAILED, WRONG_USAGE, CRASHED, INTERRUPTED = 1, 2, 70, 130
"""Exit statuses, besides 0. 70 is sysexits.h's for a fault in the program itself: a service manager may try again.
The last is the shell's for a Ctrl-C."""


def complain(args: argparse.Namespace, *lines: str, status: int = FAILED) -> int:
    """Say on stderr why the command ends; returns the exit status."""
    for line in lines:
        print(f"carousel {args.command}: {line}", file=sys.stderr)
    return status


def run_until_signal(coroutine: Coroutine[Any, Any, None], abandon: Callable[[], None] = lambda: None) -> bool:
    """Run it to its end: True. Ctrl-C or SIGTERM cancels it: False. A second one kills at once, but for what
    `abandon` does."""

    def kill(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        abandon()
        os.kill(os.getpid(), number)

    async def run() -> bool:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(coroutine)

        def interrupt() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none may come between the two handlers
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, kill)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            task.cancel()

        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, interrupt)
        try:
            await task
        except asyncio.CancelledError:
            return False
        return True

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())
