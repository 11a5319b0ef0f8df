"""An event loop that takes a few newcomers at a time: whoever streams does not wait for all who arrive at once."""

from __future__ import annotations

import asyncio
import select
import selectors
from typing import Any

NEWCOMERS_AT_ONCE = 4
"""Sockets that are looked after for the first time in one turn of the loop: each is a request to be read. What is
left comes in the next turn. The engine's socket, and connections that are known, wait for no newcomer."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """As asyncio makes one, but where a burst of connections is no single turn of seconds."""
    if not hasattr(selectors, "EpollSelector"):
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(_FewAtOnce())


class _FewAtOnce(selectors.EpollSelector):
    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = super().unregister(fileobj)
        self._known.discard(key.fd)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Rounded up as in the standard library, so that no timer is waited for in a busy loop.
        wait = -1.0 if timeout is None else max(0.0, -(-timeout // 1e-3) * 1e-3)
        keys = self.get_map()
        try:
            events = self._selector.poll(wait, max(len(keys), 1))  # type: ignore[attr-defined]
        except InterruptedError:
            return []
        ready = []
        num_newcomers = 0
        for descriptor, event in events:
            if (key := keys.get(descriptor)) is None:
                continue
            if descriptor not in self._known:
                num_newcomers += 1
                if num_newcomers > NEWCOMERS_AT_ONCE:
                    continue  # the system tells of it again
                self._known.add(descriptor)
            writes = selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0  # errors are for both
            reads = selectors.EVENT_READ if event & ~select.EPOLLOUT else 0
            ready.append((key, (writes | reads) & key.events))
        return ready
