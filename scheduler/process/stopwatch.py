"""Times the parts of a step."""

from __future__ import annotations

import time


class Stopwatch:
    """Laps, and the time since it was made."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, time.monotonic()
        return self._last - before

    @property
    def now(self) -> float:
        """When the last lap ended."""
        return self._last

    @property
    def total(self) -> float:
        """Seconds of all laps."""
        return self._last - self.started
