"""What is kept on the disk, without the event loop waiting for it, and without passing trouble being an end.

A disk is slow, full or away, and a database is locked: by another process, for a while. So all of it happens in a
thread that the users share, what went wrong for now is told apart from what is wrong, and who cannot do without
tries again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from scheduler.shared_thread import Pieces, SharedThread
from server.private import make_private

T = TypeVar("T")

BUSY_SECONDS = 5.0
"""How long a database that somebody else holds is waited for at a time."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two tries, doubled each time."""

_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN})

logger = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """Nothing can be kept or found now, which may pass; the message says why."""


@contextmanager
def passing_trouble() -> Iterator[None]:
    """Within it, raises `StorageError` for a disk that is full or fails, and for a database that is locked."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(str(error)) from error
    except OSError as error:
        if error.errno not in _PASSING:
            raise
        raise StorageError(error.strerror or str(error)) from error


async def insist(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again until there is no `StorageError`, and say so once."""
    pause = FIRST_PAUSE
    while True:
        try:
            result = await attempt()
        except StorageError as error:
            if pause == FIRST_PAUSE:
                logger.error("%s is tried again and again: %s", what, error)
        else:
            if pause > FIRST_PAUSE:
                logger.warning("%s: done, and nothing is lost", what)
            return result
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


class Disk:
    """A thread for what waits for the disk, in turns by user. What it is given raises `StorageError` where trouble
    may pass."""

    def __init__(self, name: str) -> None:
        self._thread = SharedThread(name)

    async def run(self, user: str, task: Callable[[], T]) -> T:
        """Do something short. It is done, or dropped before it began, even if who waits for it is cancelled."""

        def guarded() -> T:
            with passing_trouble():
                return task()

        return await asyncio.wrap_future(self._thread.submit(user, guarded))

    async def run_pieces(self, user: str, pieces: Pieces[T]) -> T:
        """Do something long, which others can come between."""

        def guarded() -> Pieces[T]:
            with passing_trouble():
                return (yield from pieces)

        return await asyncio.wrap_future(self._thread.submit_pieces(user, guarded()))

    async def close(self) -> None:
        """When all is done that was given to it."""
        await asyncio.to_thread(self._thread.shutdown, wait=True)


class Database(Disk):
    """An SQLite file that only its owner may read. Making it raises OSError and sqlite3.Error."""

    def __init__(self, file: Path, statements: Sequence[str]) -> None:
        """`statements` make what is not there."""
        super().__init__(file.name)
        make_private(file)
        # One thread at a time uses it: this one, and then the disk's.
        self._connection = sqlite3.connect(
            file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("pragma journal_mode = wal")
        self._connection.execute("pragma synchronous = normal")  # no wait for the disk at each statement
        for statement in statements:
            self._connection.execute(statement)

    async def ask(self, user: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns, of one transaction."""

        def transaction() -> T:
            self._connection.execute("begin")
            try:
                result = work(self._connection)
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                raise
            return result

        return await self.run(user, transaction)

    async def close(self) -> None:
        await super().close()
        self._connection.close()
