"""As many threads as there are free cores.

The threads of a forward pass wait for each other some hundred times in it. When another program takes one of
their cores, all of them go at the pace of the one that has to share, and one thread fewer is as fast or faster.
How long each thread had to wait for a core is known to the operating system.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.core.plan import Plan
    from scheduler.core.sequence import Sequence
    from scheduler.wire.messages import StepStats

logger = logging.getLogger(__name__)

WINDOW = 0.2
"""Seconds of steps between two looks."""

FIRST_TRIAL, LONGEST_TRIAL = 1.0, 16.0
"""Seconds of steps until one thread more is tried again, doubled each time that it was in vain."""


def waits() -> dict[int, float]:
    """Seconds that each thread of this process has been ready to run and had no core; nothing where the operating
    system does not tell."""
    result = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            result[int(task.name)] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            continue  # the thread has ended
    return result


class FreeCores:
    """Observes the steps of an engine, and limits the threads of its forward pass to the cores that are free."""

    def __init__(
        self, threads: int, limit: Callable[[int], None], waits: Callable[[], dict[int, float]] = waits
    ) -> None:
        self.threads = threads
        """How many threads take part now."""
        self._most = threads
        self._limit = limit
        self._waits = waits
        self._before = waits()
        self._seconds = 0.0
        self._until_trial = 0.0
        self._pause = FIRST_TRIAL
        limit(threads)  # an engine before this one in the same process may have left fewer

    def step(self, plan: Plan, started: float, stats: StepStats, ended: Iterable[Sequence]) -> None:
        """A step is over; now and then, look how long its threads waited for cores."""
        if self._most == 1:
            return
        self._seconds += stats.duration
        if self._seconds < WINDOW:
            return
        now = self._waits()
        delays = sorted((now[task] - self._before.get(task, 0.0) for task in now), reverse=True)
        slowest, next_slowest = (min(1.0, delay / self._seconds) for delay in (*delays, 0.0, 0.0)[:2])
        self._until_trial -= self._seconds
        self._before, self._seconds = now, 0.0
        # All go at the pace of the slowest, so so many threads are worth this many free ones.
        if self.threads > 1 and self.threads * (1 - slowest) < (self.threads - 1) * (1 - next_slowest):
            self._pause = min(2 * self._pause, LONGEST_TRIAL)
            self._set(self.threads - 1)
        elif self.threads < self._most and self._until_trial <= 0:
            self._set(self.threads + 1)
        elif self.threads == self._most and slowest < 0.1:
            self._pause = FIRST_TRIAL

    def _set(self, threads: int) -> None:
        logger.debug("the forward pass takes %d of %d threads", threads, self._most)
        self.threads = threads
        self._until_trial = self._pause
        self._limit(threads)
