"""The files and batches of the users of a server: a folder with SQLite beside the files themselves."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from aiohttp import web

from server.private import make_private, make_private_folder
from server.storage import Database

MAX_FILES = 100
"""Of one user, with the outputs of their batches."""

LIFETIME_SECONDS = 30 * 24 * 3600
LOOK_SECONDS = 60.0

Status = Literal["in_progress", "cancelling", "cancelled", "completed", "failed"]
UNFINISHED = ("in_progress", "cancelling")

_FILE_PREFIX = "file-"
_SERVER = ""
"""Whose turn it is where nobody in particular has asked."""


class BatchStoreError(RuntimeError):
    """The folder cannot be used; the message says why."""


class StoredFile(msgspec.Struct, frozen=True):
    """OpenAI's file."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int
    object: str = "file"
    status: str = "processed"


class RequestCounts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct):
    """OpenAI's batch. While it runs, its output has the lines that failed too."""

    id: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    in_progress_at: int
    metadata: dict[str, str] | None = None
    status: Status = "in_progress"
    output_file_id: str | None = None
    error_file_id: str | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    object: str = "batch"


def new_file_id() -> str:
    return f"{_FILE_PREFIX}{uuid.uuid4().hex}"


_TABLES = tuple(
    f"create table if not exists {table} "
    "(id text primary key, user text not null, created real not null, content blob not null) strict"
    for table in ("files", "batches")
)
_ORDER = "order by created desc, rowid desc"


class BatchStore:
    """Each file and batch is its user's own. Nothing of it happens on the event loop; what is asked of it raises
    `StorageError`, and making it `BatchStoreError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._uploading: Counter[str] = Counter()
        self._looked_at = 0.0
        try:
            make_private_folder(folder)
            self._lock = _locked(folder)
            self.disk = Database(folder / "batches.sqlite3", _TABLES)
        except (OSError, sqlite3.Error) as error:
            raise BatchStoreError(f"--batches {folder}: {error}") from error

    def path(self, file_id: str) -> Path:
        """Where the content of a file is; only for ids that were made here."""
        return self.folder / file_id

    @contextmanager
    def uploading(self, user: str) -> Iterator[int]:
        """While a file of this user comes in; how many do, with this one."""
        self._uploading[user] += 1
        try:
            yield self._uploading[user]
        finally:
            self._uploading[user] -= 1
            if not self._uploading[user]:
                del self._uploading[user]

    async def keep_file(self, user: str, file: StoredFile) -> None:
        await self._keep("files", file.id, user, file.created_at, msgspec.json.encode(file))

    async def keep_batch(self, user: str, batch: Batch) -> None:
        await self._keep("batches", batch.id, user, batch.created_at, msgspec.json.encode(batch))

    async def add_batch(self, user: str, batch: Batch, most: int) -> bool:
        """Keep a new one, unless the user has `most` that are not done."""

        def add(database: sqlite3.Connection) -> bool:
            if sum(owner == user for owner, _ in _unfinished(database)) >= most:
                return False
            row = (batch.id, user, batch.created_at, msgspec.json.encode(batch))
            database.execute("insert into batches values (?, ?, ?, ?)", row)
            return True

        return await self.disk.ask(user, add)

    async def _keep(self, table: str, row_id: str, user: str, created: float, content: bytes) -> None:
        row = (row_id, user, created, content)
        await self.disk.ask(
            user, lambda db: db.execute(f"insert or replace into {table} values (?, ?, ?, ?)", row)
        )

    async def files(self, user: str) -> list[StoredFile]:
        """The newest first."""

        def find(database: sqlite3.Connection) -> list[StoredFile]:
            rows = database.execute(f"select content from files where user = ? {_ORDER}", (user,))
            return [msgspec.json.decode(content, type=StoredFile) for (content,) in rows]

        return await self.disk.ask(user, find)

    async def batches(self, user: str) -> list[Batch]:
        """The newest first."""

        def find(database: sqlite3.Connection) -> list[Batch]:
            rows = database.execute(f"select content from batches where user = ? {_ORDER}", (user,))
            return [msgspec.json.decode(content, type=Batch) for (content,) in rows]

        return await self.disk.ask(user, find)

    async def unfinished(self) -> list[tuple[str, Batch]]:
        """Of all users, with their names, the oldest first."""
        return await self.disk.ask(_SERVER, _unfinished)

    async def forget_file(self, user: str, file_id: str) -> None:
        def forget(database: sqlite3.Connection) -> None:
            database.execute("delete from files where id = ?", (file_id,))
            self.path(file_id).unlink(missing_ok=True)

        await self.disk.ask(user, forget)

    async def forget_old(self) -> None:
        """Delete what has outlived its time. Often called, it looks once in a while."""
        now = time.time()
        if now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = now
        before = now - LIFETIME_SECONDS

        def forget(database: sqlite3.Connection) -> None:
            old = database.execute("select id from files where created < ?", (before,)).fetchall()
            for (file_id,) in old:
                self.path(file_id).unlink(missing_ok=True)
            database.execute("delete from files where created < ?", (before,))
            database.execute("delete from batches where created < ?", (before,))

        await self.disk.ask(_SERVER, forget)

    async def forget_leftovers(self) -> None:
        """Delete what no file and no batch is about: of uploads that were cut off with the server."""

        def forget(database: sqlite3.Connection) -> None:
            known = {file_id for (file_id,) in database.execute("select id from files")}
            for _, batch in _unfinished(database):
                known |= {batch.output_file_id, batch.error_file_id}
            for path in self.folder.glob(f"{_FILE_PREFIX}*"):
                if path.name.partition(".")[0] not in known:
                    path.unlink(missing_ok=True)

        await self.disk.ask(_SERVER, forget)

    async def close(self) -> None:
        await self.disk.close()
        os.close(self._lock)


def _unfinished(database: sqlite3.Connection) -> list[tuple[str, Batch]]:
    rows = database.execute("select user, content from batches order by created, rowid").fetchall()
    found = [(user, msgspec.json.decode(content, type=Batch)) for user, content in rows]
    return [(user, batch) for user, batch in found if batch.status in UNFINISHED]


def _locked(folder: Path) -> int:
    """A descriptor that keeps others from a folder for as long as it is open. Raises OSError."""
    make_private(file := folder / "lock")
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise OSError("another server keeps its batches there: give this one a folder of its own") from None
    return descriptor


BATCHES = web.AppKey("batches", BatchStore)
"""Only where they are kept."""
