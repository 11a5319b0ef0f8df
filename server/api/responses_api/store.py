"""Responses that are kept, so that others can follow them: in SQLite, so many and for so long."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from server.private import make_private

MAX_RESPONSES = 10_000
"""Of all users; the oldest go first."""

LIFETIME_SECONDS = 30 * 24 * 3600

Json = dict[str, Any]

logger = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The file cannot be used; the message says why."""


class Stored(msgspec.Struct, frozen=True):
    response: bytes
    items: list[Json]
    """All that was said up to it and in it."""


class ResponseStore:
    """Each response is its user's own. Without a wait for the disk: what was kept last may be lost with the
    machine, not with the server. Raises `StoreError`."""

    def __init__(self, file: Path) -> None:
        try:
            make_private(file)
            self._database = sqlite3.connect(file, isolation_level=None)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            self._database.execute(
                "create table if not exists responses (id text primary key, user text not null, "
                "created real not null, response blob not null, items text not null) strict"
            )
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"--store {file}: {error}") from error

    def keep(self, response_id: str, user: str, response: bytes, items: list[Json]) -> None:
        """Logs what goes wrong: the answer is out by then."""
        now = time.time()
        try:
            row = (response_id, user, now, response, json.dumps(items))
            self._database.execute("insert or replace into responses values (?, ?, ?, ?, ?)", row)
            self._database.execute("delete from responses where created < ?", (now - LIFETIME_SECONDS,))
            self._database.execute(
                "delete from responses where rowid in "
                "(select rowid from responses order by created desc limit -1 offset ?)",
                (MAX_RESPONSES,),
            )
        except sqlite3.Error:
            logger.exception("the response %s could not be kept", response_id)

    def find(self, response_id: str, user: str) -> Stored | None:
        row = self._database.execute(
            "select response, items from responses where id = ? and user = ? and created >= ?",
            (response_id, user, time.time() - LIFETIME_SECONDS),
        ).fetchone()
        return None if row is None else Stored(row[0], json.loads(row[1]))

    def forget(self, response_id: str, user: str) -> bool:
        """Whether there was one."""
        ours = self._database.execute("delete from responses where id = ? and user = ?", (response_id, user))
        return ours.rowcount > 0

    def close(self) -> None:
        self._database.close()


RESPONSES = web.AppKey("responses", ResponseStore)
"""Only where they are kept."""


async def store_lifetime(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`."""
    yield
    app[RESPONSES].close()
