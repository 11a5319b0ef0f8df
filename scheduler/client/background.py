"""Tasks that go on beside the requests: none of them may end without a word."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until a task that failed runs again, doubled each time that it fails soon after."""

logger = logging.getLogger(__name__)


async def keep_running(what: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a task until it returns, or is cancelled. Where it fails, its traceback is logged, and after a pause it
    runs again."""
    pause = FIRST_PAUSE
    while True:
        started = time.monotonic()
        try:
            return await run()
        except Exception:
            if time.monotonic() - started > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            logger.exception("%s failed; it goes on in %.0f s", what, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
