"""An event loop that takes a few things at a time: whoever streams does not wait for all who arrive at once."""

from __future__ import annotations

import asyncio
import select
import selectors

EVENTS_AT_ONCE = 4
"""Sockets that are looked after in one turn of the loop. What is left comes in the next one: the system hands out
events in turn."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """As asyncio makes one, but where a burst of connections is no single turn of seconds."""
    if not hasattr(selectors, "EpollSelector"):
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(_FewAtOnce())


class _FewAtOnce(selectors.EpollSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Rounded up as in the standard library, so that no timer is waited for in a busy loop.
        wait = -1.0 if timeout is None else max(0.0, -(-timeout // 1e-3) * 1e-3)
        try:
            events = self._selector.poll(wait, EVENTS_AT_ONCE)  # type: ignore[attr-defined]
        except InterruptedError:
            return []
        keys = self.get_map()
        ready = []
        for descriptor, event in events:
            if (key := keys.get(descriptor)) is not None:
                writes = selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0  # errors are for both
                reads = selectors.EVENT_READ if event & ~select.EPOLLOUT else 0
                ready.append((key, (writes | reads) & key.events))
        return ready
