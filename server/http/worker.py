"""A thread for what takes long, so that the streams on the event loop go on meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from aiohttp import web

from scheduler.shared_thread import SharedThread
from server.http.turnstile import Turnstile

T = TypeVar("T")

WORKER = web.AppKey("worker", SharedThread)
TURNSTILE = web.AppKey("turnstile", Turnstile)

SWITCH_SECONDS = 0.0005
"""How soon the event loop gets the interpreter back from the thread, each time that it wants it: several times for
each token that it sends."""

LONG = 2048
"""Bytes of a body from which it is read and tokenized in the thread (about 1 ms)."""


def new_worker() -> SharedThread:
    """One thread: more would only take the processor from the engine, and what waits is bounded by the queue."""
    return SharedThread("worker")


async def work(app: web.Application, user: str, num_bytes: int, task: Callable[[], T]) -> T:
    """Do what takes time in proportion to so many bytes, where it holds nobody up: other users neither."""
    if num_bytes < LONG:
        await app[TURNSTILE].enter(user)
        return task()
    return await asyncio.wrap_future(app[WORKER].submit(user, task))


async def worker_lifetime(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`: what has not begun at the end is dropped."""
    sys.setswitchinterval(SWITCH_SECONDS)
    yield
    app[WORKER].shutdown()
