"""A thread for what takes long, so that the streams on the event loop go on meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aiohttp import web

T = TypeVar("T")

WORKER = web.AppKey("worker", ThreadPoolExecutor)

SWITCH_SECONDS = 0.0005
"""How soon the event loop gets the interpreter back from the thread, each time that it wants it: several times for
each token that it sends."""

LONG = 8192
"""Bytes of a body from which it is read and tokenized in the thread (about 2 ms)."""


def new_worker() -> ThreadPoolExecutor:
    """One thread: more would only take the processor from the engine, and what waits is bounded by the queue."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")


async def work(app: web.Application, num_bytes: int, task: Callable[[], T]) -> T:
    """Do what takes time in proportion to so many bytes, where it holds nobody up."""
    if num_bytes < LONG:
        return task()
    return await asyncio.get_running_loop().run_in_executor(app[WORKER], task)


async def worker_lifetime(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`: what has not begun at the end is dropped."""
    sys.setswitchinterval(SWITCH_SECONDS)
    yield
    app[WORKER].shutdown(wait=False, cancel_futures=True)
