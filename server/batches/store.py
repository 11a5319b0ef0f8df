"""The files and batches of the users of a server: a folder with SQLite beside the files themselves."""

from __future__ import annotations

import sqlite3
import time
import uuid
from pathlib import Path
from typing import Literal

import msgspec
from aiohttp import web

from server.private import make_private

MAX_FILES = 100
"""Of one user, with the outputs of their batches."""

LIFETIME_SECONDS = 30 * 24 * 3600

Status = Literal["in_progress", "cancelling", "cancelled", "completed", "failed"]
UNFINISHED = ("in_progress", "cancelling")


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
    return f"file-{uuid.uuid4().hex}"


class BatchStore:
    """Each file and batch is its user's own. Raises `BatchStoreError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "batches.sqlite3"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private(file)
            self._database = sqlite3.connect(file, isolation_level=None)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")  # no wait for the disk at each line's count
            for table in ("files", "batches"):
                self._database.execute(
                    f"create table if not exists {table} "
                    "(id text primary key, user text not null, created real not null, content blob not null) "
                    "strict"
                )
        except (OSError, sqlite3.Error) as error:
            raise BatchStoreError(f"--batches {folder}: {error}") from error

    def path(self, file_id: str) -> Path:
        """Where the content of a file is; only for ids that were made here."""
        return self.folder / file_id

    def keep_file(self, user: str, file: StoredFile) -> None:
        self._keep("files", file.id, user, file.created_at, msgspec.json.encode(file))

    def keep_batch(self, user: str, batch: Batch) -> None:
        self._keep("batches", batch.id, user, batch.created_at, msgspec.json.encode(batch))

    def _keep(self, table: str, row_id: str, user: str, created: float, content: bytes) -> None:
        row = (row_id, user, created, content)
        self._database.execute(f"insert or replace into {table} values (?, ?, ?, ?)", row)

    def files(self, user: str) -> list[StoredFile]:
        """The newest first."""
        rows = self._database.execute(
            "select content from files where user = ? order by created desc, rowid desc", (user,)
        )
        return [msgspec.json.decode(content, type=StoredFile) for (content,) in rows]

    def batches(self, user: str) -> list[Batch]:
        """The newest first."""
        rows = self._database.execute(
            "select content from batches where user = ? order by created desc, rowid desc", (user,)
        )
        return [msgspec.json.decode(content, type=Batch) for (content,) in rows]

    def unfinished(self) -> list[tuple[str, Batch]]:
        """Of all users, with their names, the oldest first."""
        rows = self._database.execute("select user, content from batches order by created, rowid").fetchall()
        found = [(user, msgspec.json.decode(content, type=Batch)) for user, content in rows]
        return [(user, batch) for user, batch in found if batch.status in UNFINISHED]

    def forget_file(self, file_id: str) -> None:
        self._database.execute("delete from files where id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    def forget_old(self) -> None:
        """Delete what has outlived its time."""
        before = time.time() - LIFETIME_SECONDS
        for (file_id,) in self._database.execute("select id from files where created < ?", (before,)).fetchall():
            self.forget_file(file_id)
        self._database.execute("delete from batches where created < ?", (before,))

    def close(self) -> None:
        self._database.close()


BATCHES = web.AppKey("batches", BatchStore)
"""Only where they are kept."""
