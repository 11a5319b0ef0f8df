"""`/v1/files` and `/v1/batches` through the openai SDK: two users, and a restart in the middle."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.server.serving import Server
from tests.server.test_batch_command import line
from tests.server.users_server import UsersServer

NUM_LINES = 16


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("keeping")
    with Server(folder / "log", "--batches", str(folder / "batches"), "--kv-cache-memory", "64MB") as server:
        yield server


def client_of(server: UsersServer, name: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=server.keys[name], max_retries=0)


def until(client: OpenAI, batch: Batch, num_completed: int) -> Batch:
    deadline = time.monotonic() + 60
    while True:
        batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        if batch.request_counts.completed >= num_completed:
            return batch
        assert batch.status == "in_progress"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_done(client: OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch.id)).status == "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return batch


def start(client: OpenAI, num_lines: int, max_tokens: int) -> Batch:
    lines = [line(f"line-{number}", max_tokens=max_tokens) for number in range(num_lines)]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert file.bytes == len(content)
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"of": "a test"}
    )


@pytest.mark.prove
def test_a_batch_survives_a_restart_and_is_its_users_own(tmp_path: Path, model_path: str) -> None:
    flags = ["--batches", str(tmp_path / "batches"), "--max-num-seqs", "2", "--kv-cache-memory", "64MB"]
    server = UsersServer(tmp_path, {"alice": {}, "bob": {}}, *flags)
    with server, client_of(server, "alice") as alice:
        batch = until(alice, start(alice, NUM_LINES, max_tokens=8), 3)
        assert batch.request_counts is not None
        assert batch.request_counts.completed < NUM_LINES
        server.stop(signal.SIGKILL)
    with server, client_of(server, "alice") as alice, client_of(server, "bob") as bob:
        batch = until_done(alice, batch)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        assert batch.metadata == {"of": "a test"}
        assert batch.output_file_id is not None
        answers = [json.loads(text) for text in alice.files.content(batch.output_file_id).iter_lines()]
        assert Counter(answer["custom_id"] for answer in answers) == Counter(f"line-{n}" for n in range(NUM_LINES))
        assert all(answer["response"]["status_code"] == 200 for answer in answers)
        assert batch.error_file_id is None
        assert [file.purpose for file in alice.files.list(limit=1)] == ["batch_output", "batch"], "page by page"

        assert list(bob.files.list()) == []
        assert list(bob.batches.list()) == []
        for forbidden in (bob.files.content, bob.files.retrieve, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                forbidden(batch.output_file_id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
            )

        lines = [
            line("good", "/v1/responses") | {"body": {"input": "Hi", "max_output_tokens": 2}},
            line("bad", "/v1/responses") | {"body": {"input": "Hi", "max_output_tokens": -2}},
            line("elsewhere"),
            line("other", "/v1/responses") | {"body": {"input": "Hi", "model": "gpt-5"}},
        ]
        file = bob.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
        mixed = until_done(
            bob,
            bob.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h"),
        )
        assert mixed.request_counts is not None
        assert mixed.request_counts.to_dict() == {"total": 4, "completed": 1, "failed": 3}
        assert mixed.output_file_id is not None
        assert mixed.error_file_id is not None
        (answer,) = [json.loads(text) for text in bob.files.content(mixed.output_file_id).iter_lines()]
        assert answer["response"]["body"]["object"] == "response"
        errors = [json.loads(text) for text in bob.files.content(mixed.error_file_id).iter_lines()]
        refused = {each["custom_id"]: each["response"]["body"]["error"]["param"] for each in errors}
        assert refused == {"bad": "max_output_tokens", "elsewhere": "url", "other": "model"}

        long = start(bob, 4, max_tokens=1000)  # within the context of 64 MB: a line that is refused is done
        time.sleep(0.2)
        assert bob.batches.retrieve(long.id).request_counts == long.request_counts, "no line is done"
        assert bob.batches.cancel(long.id).status == "cancelled"
        assert alice.files.delete(batch.input_file_id).deleted
        with pytest.raises(openai.NotFoundError):
            alice.files.retrieve(batch.input_file_id)


@pytest.mark.prove
async def test_its_lines_do_not_count_in_the_queue_of_its_user(tmp_path: Path, model_path: str) -> None:
    """One seat is taken, and lines of Alice's batch wait for it: her own request may wait too."""
    flags = ["--batches", str(tmp_path / "batches"), "--max-num-seqs", "1", "--kv-cache-memory", "64MB"]
    with (
        UsersServer(tmp_path, {"alice": {"limits": {"max_queued": 1}}}, *flags) as server,
        client_of(server, "alice") as alice,
    ):
        first = asyncio.create_task(server.ask("alice", {"prompt": "On", "max_tokens": 400, "ignore_eos": True}))
        await server.until("carousel_requests_running", 1)
        await asyncio.to_thread(start, alice, 3, 4)
        await server.until("carousel_requests_waiting", 1)
        assert (await server.ask("alice", {"prompt": "Yes", "max_tokens": 1})).status == 200
        assert (await first).status == 200


def test_without_a_folder_it_is_said_how_to_have_one(server: Server) -> None:
    with server.client() as client, pytest.raises(openai.NotFoundError, match="--batches FOLDER"):
        client.batches.list()


@pytest.mark.parametrize(
    ("boundary", "more", "status"),
    [
        ("b" * 70, b"", 200),
        ("b", b'--b\r\nContent-Disposition: form-data; name="\x0b"\r\n\r\n{}\r\n', 400),
        ("b" * 71, b"", 400),
    ],
)
async def test_forms_that_no_sdk_makes(keeping: Server, boundary: str, more: bytes, status: int) -> None:
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"\r\n\r\n{{}}\r\n'
    fields = part.format("purpose", "batch") + part.format("file", "{}")
    content = more + fields.encode() + f"--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{keeping.url}/v1/files", data=content, headers=headers) as answer,
    ):
        assert answer.status == status, await answer.text()
