"""How many connections there are: where no more fit, those on which nothing is asked make room."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from server.http.errors import ApiError

OTHER_DESCRIPTORS = 128
"""Of what the system lets a process have open, what is left for all that is no connection."""


class Connection(Protocol):
    """One that can be ended."""

    def force_close(self) -> None:
        """At once."""


class Connections:
    """Open ones, at most `limit` but for those that are being closed. A newcomer takes the place of the one that
    has been idle for longest, or has not come to the end of its first request's head. Where all are busy, the
    newcomer's request is refused: nobody who is served loses a connection."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[Connection, None] = {}
        """In the order in which they became so."""
        self._busy: set[Connection] = set()
        self._surplus: set[Connection] = set()

    def opened(self, connection: Connection) -> None:
        if len(self._idle) + len(self._busy) >= self._limit:
            if self._idle:
                longest = next(iter(self._idle))
                self.closed(longest)
                longest.force_close()
            else:
                self._surplus.add(connection)
        self._idle[connection] = None

    def closed(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._busy.discard(connection)
        self._surplus.discard(connection)

    @contextmanager
    def asked(self, connection: Connection, *, always: bool = False) -> Iterator[None]:
        """While a request of this connection is answered. Raises `ApiError` where there is no room for it, unless
        it is `always` answered."""
        if connection in self._surplus and always:
            yield
            return
        if connection in self._surplus:
            raise ApiError(
                503,
                f"this server has {self._limit} connections, and all of them are busy; try again in a moment",
                type="server_busy",
                code="too_many_connections",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._idle.pop(connection, None)
        self._busy.add(connection)
        try:
            yield
        finally:
            if connection in self._busy:  # else it was closed meanwhile
                self._busy.remove(connection)
                self._idle[connection] = None


def most_connections(wanted: int) -> int:
    """As many as are wanted, if the system lets this process have as many open; it is asked to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - OTHER_DESCRIPTORS))
