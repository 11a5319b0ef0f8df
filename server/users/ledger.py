"""Who used how much on which day: a table in an SQLite file that outlives the server.

What is used is added up in memory as it happens and written twice a second, by a thread of its own, so that a
crash loses a second at most and no stream waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from scheduler.client.background import keep_running
from server.private import keep_private, make_private

WRITE_SECONDS = 0.5
_SECONDS_A_DAY = 86400

_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
    user TEXT NOT NULL,
    day TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    engine_seconds REAL NOT NULL,
    PRIMARY KEY (user, day)
) WITHOUT ROWID
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    engine_seconds = engine_seconds + excluded.engine_seconds
"""
_SELECT = """
SELECT requests, prompt_tokens, cached_tokens, completion_tokens, engine_seconds, user, day FROM usage
WHERE day >= ? AND (? IS NULL OR user = ?) ORDER BY day, user
"""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LedgerError(RuntimeError):
    """The ledger's file cannot be used; the message says why."""


class Amounts(msgspec.Struct):
    """What was used."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those prompt tokens that the prefix cache spared."""
    completion_tokens: int = 0
    engine_seconds: float = 0.0

    def add(self, other: Amounts) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.engine_seconds += other.engine_seconds


UsedByDay = defaultdict[tuple[str, int], Amounts]
"""By user and day, a day counted from 1970."""


class DayUsage(Amounts, kw_only=True):
    """What one user used on one day."""

    user: str
    day: str
    """In UTC: 2026-03-01."""


class Ledger:
    """Adds up what is used, and keeps it in a file; without one, for as long as the server runs.

    Everything is called on the event loop; SQLite sees one thread only.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._is_failing = False
        """Whether the last try to write did."""
        self._used: UsedByDay = defaultdict(Amounts)
        """What the writer has not been given yet."""
        self.unwritten: UsedByDay = defaultdict(Amounts)
        """The writer's own: what it could not write so far. However long a disk is full, it holds no more than an
        entry for each user and day."""
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._database: sqlite3.Connection

    async def __aenter__(self) -> Self:
        """Raises `LedgerError`."""
        await self._in_writer(self._open)
        self._writing = asyncio.create_task(keep_running("writing to the ledger", self._write_regularly))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._writing.cancel()  # what it gave to the writer is written all the same
        await asyncio.gather(self._writing, return_exceptions=True)
        await self._flush()
        await self._in_writer(self._close)
        self._writer.shutdown()

    def add(
        self,
        user: str,
        *,
        requests: int = 0,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        engine_seconds: float = 0.0,
    ) -> None:
        """Note what a user has just used."""
        today = int(time.time()) // _SECONDS_A_DAY
        self._used[user, today].add(
            Amounts(requests, prompt_tokens, cached_tokens, completion_tokens, engine_seconds)
        )

    async def usage(self, user: str, since: str = "") -> list[DayUsage]:
        """A user's days, oldest first, up to this moment."""
        await self._flush()
        return await self._in_writer(lambda: _select(self._database, user, since))

    async def _write_regularly(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            await self._flush()

    async def _flush(self) -> None:
        used, self._used = self._used, defaultdict(Amounts)
        await self._in_writer(lambda: self._write(used))

    async def _in_writer(self, work: Callable[[], T]) -> T:
        """What was handed to the writer is done even if who waits for it is cancelled."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._writer, work))

    # In the writer's thread -----------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            if self._file is not None:
                _make_private(self._file.resolve())
            self._database = sqlite3.connect(self._file or ":memory:")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")  # a power cut loses no more than a crash does
            self._database.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise LedgerError(f"{self._file}: cannot keep the ledger there: {reason}") from error

    def _write(self, used: UsedByDay) -> None:
        """Add to the table, or keep it for the next time if the disk is full or somebody else holds the file."""
        for key, amounts in used.items():
            self.unwritten[key].add(amounts)
        if not self.unwritten:
            return
        try:
            with self._database:
                for (user, day), amounts in self.unwritten.items():
                    self._database.execute(_ADD, (user, _date(day), *msgspec.structs.astuple(amounts)))
        except sqlite3.Error as error:
            if not self._is_failing:  # it is tried twice a second: a full disk needs no line for each
                logger.error("%s: cannot be written, and is tried again and again: %s", self._file, error)
            self._is_failing = True
        else:
            if self._is_failing:
                logger.warning("%s: can be written again, and nothing is lost", self._file)
            self._is_failing = False
            self.unwritten.clear()

    def _close(self) -> None:
        self._database.close()


def read_ledger(file: Path, user: str | None = None, since: str = "") -> list[DayUsage]:
    """What a ledger's file says, oldest first; a server may be writing it. Raises `LedgerError`."""
    if not file.is_file():
        raise LedgerError(f"{file}: there is no such file; `carousel serve --ledger {file}` makes it")
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _select(database, user, since)
    except sqlite3.Error as error:
        raise LedgerError(f"{file}: cannot be read as a ledger: {error}") from error


def total(days: Iterable[Amounts]) -> Amounts:
    amounts = Amounts()
    for day in days:
        amounts.add(day)
    return amounts


def _select(database: sqlite3.Connection, user: str | None, since: str) -> list[DayUsage]:
    rows = database.execute(_SELECT, (since, user, user))
    return [DayUsage(*row[:5], user=row[5], day=row[6]) for row in rows]


def _make_private(file: Path) -> None:
    """A ledger says who asks when and how much. What SQLite puts beside it takes after it. Raises OSError."""
    make_private(file)
    for suffix in ("-wal", "-shm"):  # of a server that crashed
        keep_private(file.with_name(file.name + suffix))


def _date(day: int) -> str:
    """A day counted from 1970, as people write it."""
    return datetime.fromtimestamp(day * _SECONDS_A_DAY, UTC).date().isoformat()
