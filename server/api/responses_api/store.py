"""Responses that are kept, so that others can follow them: in SQLite, so many, so large and for so long.

Each user has a part: where there is no room, the oldest of who holds most go first.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from server.storage import Database, insist

MAX_RESPONSES = 10_000
MAX_BYTES = 1 << 30
"""Of all users, each of them; where there are more, the oldest of the user with most of them go."""

MAX_WAITING_BYTES = 64 << 20
"""Of responses that a disk or a lock does not let be written: what is more is not kept."""

LIFETIME_SECONDS = 30 * 24 * 3600

Json = dict[str, Any]

_STATEMENTS = (
    "create table if not exists responses (id text primary key, user text not null, created real not null, "
    "response blob not null, items text not null) strict",
    "create index if not exists responses_by_age on responses (user, created, length(response) + length(items))",
    # What each user has, kept by the database itself: counting would look at every row.
    "create table if not exists holdings (user text primary key, number integer not null, bytes integer not null) "
    "strict, without rowid",
    "create trigger if not exists kept after insert on responses begin "
    "insert into holdings values (new.user, 1, length(new.response) + length(new.items)) "
    "on conflict do update set number = number + 1, bytes = bytes + excluded.bytes; end",
    "create trigger if not exists forgotten after delete on responses begin "
    "update holdings set number = number - 1, bytes = bytes - length(old.response) - length(old.items) "
    "where user = old.user; "
    "delete from holdings where user = old.user and number <= 0; end",
    "delete from holdings",
    "insert into holdings select user, count(*), sum(length(response) + length(items)) from responses "
    "group by user",
)

logger = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The file cannot be used; the message says why."""


class Stored(msgspec.Struct, frozen=True):
    response: bytes
    items: list[Json]
    """All that was said up to it and in it."""


class ResponseStore:
    """Each response is its user's own. Nothing here happens on the event loop. Without a wait for the disk: what
    was kept last may be lost with the machine, not with the server. Making it raises `StoreError`."""

    def __init__(self, file: Path, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._file = file
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_waiting_bytes = 0
        self._keeping: set[asyncio.Task[None]] = set()
        try:
            self._database = Database(file, _STATEMENTS)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"--store {file}: {error}") from error

    def keep(self, response_id: str, user: str, response: bytes, items: list[Json]) -> None:
        """From now on it is found: what is asked of this user later waits for it. For the event loop."""
        if self._num_waiting_bytes > MAX_WAITING_BYTES:
            logger.error("the response %s is not kept: %s cannot be written", response_id, self._file)
            return
        task = asyncio.create_task(self._keep(response_id, user, response, items))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def _keep(self, response_id: str, user: str, response: bytes, items: list[Json]) -> None:
        self._num_waiting_bytes += (size := len(response))

        def write(database: sqlite3.Connection) -> None:
            row = (response_id, user, time.time(), response, msgspec.json.encode(items).decode())
            database.execute("insert into responses values (?, ?, ?, ?, ?)", row)
            self._make_room(database, user)

        try:
            await insist(f"keeping responses in {self._file}", lambda: self._database.ask(user, write))
        except Exception:
            logger.exception("the response %s could not be kept", response_id)
        finally:
            self._num_waiting_bytes -= size

    def _make_room(self, database: sqlite3.Connection, user: str) -> None:
        too_old = time.time() - LIFETIME_SECONDS
        database.execute("delete from responses where user = ? and created < ?", (user, too_old))
        while True:
            number, size = database.execute("select sum(number), sum(bytes) from holdings").fetchone()
            if (number or 0) > self._max_responses:
                most = "number"
            elif (size or 0) > self._max_bytes:
                most = "bytes"
            else:
                return
            database.execute(
                "delete from responses where rowid in (select rowid from responses where user = "
                f"(select user from holdings order by {most} desc limit 1) order by created limit 1)"
            )

    async def find(self, response_id: str, user: str) -> Stored | None:
        """Raises `StorageError`."""
        await asyncio.sleep(0)  # what was kept just now goes first
        row = await self._database.ask(
            user,
            lambda database: database.execute(
                "select response, items from responses where id = ? and user = ? and created >= ?",
                (response_id, user, time.time() - LIFETIME_SECONDS),
            ).fetchone(),
        )
        return None if row is None else Stored(row[0], msgspec.json.decode(row[1]))

    async def forget(self, response_id: str, user: str) -> bool:
        """Whether there was one. Raises `StorageError`."""
        return await self._database.ask(
            user,
            lambda database: (
                database.execute("delete from responses where id = ? and user = ?", (response_id, user)).rowcount
                > 0
            ),
        )

    async def close(self) -> None:
        """What cannot be written now is not kept."""
        await asyncio.wait(self._keeping, timeout=1.0) if self._keeping else None
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await self._database.close()


RESPONSES = web.AppKey("responses", ResponseStore)
"""Only where they are kept."""


async def store_lifetime(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`."""
    yield
    await app[RESPONSES].close()
