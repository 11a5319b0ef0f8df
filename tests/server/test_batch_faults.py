"""Trouble that passes ends no batch: a database that is locked, a user who is disabled, a disk that is full."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from server.users.file import set_disabled
from tests.server.serving import carousel
from tests.server.test_batch_command import line
from tests.server.test_batches import client_of, start, until, until_done
from tests.server.users_server import UsersServer

NUM_LINES = 40


@pytest.fixture
def batching(tmp_path: Path, model_path: str) -> Iterator[UsersServer]:
    flags = ["--batches", str(tmp_path / "batches"), "--max-num-seqs", "2", "--kv-cache-memory", "64MB"]
    with UsersServer(tmp_path, {"alice": {}, "bob": {}}, *flags) as server:
        yield server


def check_whole(client: OpenAI, batch_id: str) -> None:
    batch = until_done(client, client.batches.retrieve(batch_id))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert batch.output_file_id is not None
    answers = [json.loads(text) for text in client.files.content(batch.output_file_id).iter_lines()]
    assert len({answer["custom_id"] for answer in answers}) == len(answers) == NUM_LINES


@pytest.mark.prove
def test_a_locked_database_and_a_disabled_user_are_waited_for(batching: UsersServer, tmp_path: Path) -> None:
    with client_of(batching, "alice") as alice:
        batch = until(alice, start(alice, NUM_LINES, max_tokens=8), 3)
        with closing(sqlite3.connect(tmp_path / "batches" / "batches.sqlite3", isolation_level=None)) as other:
            other.execute("begin exclusive")
            time.sleep(9)  # longer than SQLite waits
            other.execute("rollback")
        check_whole(alice, batch.id)

        batch = until(alice, start(alice, NUM_LINES, max_tokens=8), 3)
        set_disabled(batching.users_file, "alice", True)
        asyncio.run(batching.until_status("alice", 401))
        time.sleep(2)
        set_disabled(batching.users_file, "alice", False)
        asyncio.run(batching.until_status("alice", 200))
        check_whole(alice, batch.id)


def test_a_second_server_does_not_take_the_folder(batching: UsersServer, tmp_path: Path) -> None:
    result = carousel("serve", "--port", "0", "--batches", str(tmp_path / "batches"))
    assert result.returncode == 1
    assert "another server keeps its batches there" in result.stderr
    assert "Traceback" not in result.stderr


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Callable[[], None]:
    """Until nothing more fits. The result makes room again."""
    with (disk / "filling").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    return (disk / "filling").unlink


@pytest.mark.prove
def test_a_full_disk_is_waited_for(tmp_path: Path, model_path: str) -> None:
    with small_disk(tmp_path / "disk") as disk:
        flags = ["--batches", str(disk), "--max-num-seqs", "2", "--kv-cache-memory", "64MB"]
        with UsersServer(tmp_path, {"alice": {}}, *flags) as server, client_of(server, "alice") as alice:
            batch = until(alice, start(alice, NUM_LINES, max_tokens=8), 3)
            make_room = fill(disk)
            asyncio.run(server.until_logged("is tried again and again"))
            assert asyncio.run(server.ask("alice")).status == 200, "others are served"
            with pytest.raises(Exception, match="503"):
                alice.files.create(file=("in.jsonl", b"x" * 100_000), purpose="batch")
            make_room()
            check_whole(alice, batch.id)
            assert "Traceback" not in server.log


def test_a_file_of_nothing_but_bad_lines_is_answered(batching: UsersServer) -> None:
    """Beside the event loop, and many at a time; of blank lines, and of more than there may be, the same."""
    with client_of(batching, "bob") as bob:

        def created(content: bytes) -> str:
            file = bob.files.create(file=("in.jsonl", content), purpose="batch")
            batch = bob.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            return batch.id

        good = json.dumps(line("good", max_tokens=1)).encode()
        batch = until_done(bob, bob.batches.retrieve(created(b"x\n" * 20_000 + good + b"\n" * 200_000)))
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 20_001, "completed": 1, "failed": 20_000}
        assert batch.error_file_id is not None
        errors = bob.files.content(batch.error_file_id).text.splitlines()
        assert len(errors) == 20_000
        for content in (b"x\n" * 50_001, b"\n" * 1_000_001):
            with pytest.raises(Exception, match="more than 50000 requests"):
                created(content)
