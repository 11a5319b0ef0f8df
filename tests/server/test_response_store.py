"""The store of responses: bounds by user, a database that is locked, and nothing of it on the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from server.api.responses_api.store import ResponseStore
from server.storage import Database, StorageError
from tests.server.serving import Server

ITEMS = [{"type": "message", "role": "user", "content": "Hi"}]


@asynccontextmanager
async def kept_in(file: Path, **bounds: int) -> AsyncIterator[ResponseStore]:
    store = ResponseStore(file, **bounds)
    yield store
    await store.close()


async def numbers_of(store: ResponseStore, user: str, count: int) -> list[int]:
    return [number for number in range(count) if await store.find(f"{user}{number}", user) is not None]


async def test_one_users_flood_pushes_out_their_own_and_nobody_elses(tmp_path: Path) -> None:
    async with kept_in(tmp_path / "store", max_responses=8) as store:
        for number in range(3):
            store.keep(f"bob{number}", "bob", b"{}", ITEMS)
        for number in range(20):
            store.keep(f"alice{number}", "alice", b"{}", ITEMS)
        assert await numbers_of(store, "alice", 20) == [15, 16, 17, 18, 19]
        assert await numbers_of(store, "bob", 3) == [0, 1, 2]
        assert await store.find("bob1", "alice") is None
        assert await store.forget("bob1", "bob")
        store.keep("alice20", "alice", b"{}", ITEMS)
        assert await numbers_of(store, "alice", 21) == [15, 16, 17, 18, 19, 20]


async def test_there_is_a_bound_in_bytes_too(tmp_path: Path) -> None:
    async with kept_in(tmp_path / "store", max_bytes=10_000) as store:
        store.keep("bob0", "bob", b"b" * 3000, ITEMS)
        for number in range(9):
            store.keep(f"alice{number}", "alice", b"a" * 3000, ITEMS)
        assert await numbers_of(store, "alice", 9) == [7, 8]
        assert await numbers_of(store, "bob", 1) == [0]


async def test_what_is_there_is_counted_at_the_start(tmp_path: Path) -> None:
    async with kept_in(tmp_path / "store", max_responses=4) as store:
        for number in range(4):
            store.keep(f"alice{number}", "alice", b"{}", ITEMS)
    async with kept_in(tmp_path / "store", max_responses=4) as store:
        store.keep("alice4", "alice", b"{}", ITEMS)
        assert await numbers_of(store, "alice", 5) == [1, 2, 3, 4]


async def test_a_locked_database_is_waited_for_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.storage.BUSY_SECONDS", 0.1)
    threads: set[int] = set()
    ask = Database.run

    async def noting(database: Database, user: str, task: Callable[[], Any]) -> Any:
        def noted() -> Any:
            threads.add(threading.get_ident())
            return task()

        return await ask(database, user, noted)

    monkeypatch.setattr(Database, "run", noting)
    async with kept_in(tmp_path / "store") as store:
        with closing(sqlite3.connect(tmp_path / "store", isolation_level=None)) as other:
            other.execute("begin exclusive")
            store.keep("alice0", "alice", b"{}", ITEMS)
            await asyncio.sleep(0.5)
            other.execute("rollback")
        async with asyncio.timeout(30):
            while await store.find("alice0", "alice") is None:
                await asyncio.sleep(0.05)
    assert threads
    assert threading.get_ident() not in threads


async def test_what_cannot_be_found_now_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.storage.BUSY_SECONDS", 0.1)
    async with kept_in(tmp_path / "store") as store:
        with closing(sqlite3.connect(tmp_path / "store", isolation_level=None)) as other:
            other.execute("begin exclusive")
            with pytest.raises(StorageError, match="locked"):
                await store.forget("alice0", "alice")


async def test_a_long_request_follows_another(dressed_server: Server) -> None:
    """It is read in a thread, which may not touch the event loop's database."""
    status, first = await dressed_server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 1})
    assert status == 200
    body = {"input": "understanding " * 700, "max_output_tokens": 1, "previous_response_id": first["id"]}
    status, second = await dressed_server.post("/v1/responses", body)
    assert status == 200, second
    assert second["previous_response_id"] == first["id"]
