"""All endpoints that the specification names, each with what none of them may suffer from."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from server.api.trace import AT_ONCE
from tests.server.serving import Json, Server
from tests.server.test_batch_faults import fill, small_disk

DIGITS = "1" + "0" * 4999
SMALL: dict[str, Json] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/api/chat": {"messages": [{"role": "user", "content": "a"}], "options": {"num_predict": 1}},
    "/api/generate": {"prompt": "a", "options": {"num_predict": 1}},
    "/api/embed": {"input": "a"},
    "/api/show": {"model": ""},
    "/completion": {"prompt": "a", "n_predict": 1},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 1},
    "/apply-template": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [7]},
    "/v1/batches": {"input_file_id": "none", "endpoint": "/v1/completions", "completion_window": "24h"},
}
BODYLESS = {"/ping", "/v1/trace", "/v1/batches/{id}/cancel"}
FORM = "multipart/form-data; boundary=b"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of a mebibyte, if that can be."""
    with disk_at(tmp_path_factory.mktemp("small") / "disk") as folder:
        yield folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, disk: Path, model_path: str) -> Iterator[Server]:
    """Bodies of 1 MiB at most, and little patience. Everything is kept on the small disk."""
    with ExitStack() as stack:
        flags = ["--max-model-len", "256", "--max-num-seqs", "4", "--slow-body-seconds", "2", "--dtype", "float32"]
        flags += [
            "--batches",
            str(disk / "batches"),
            "--store",
            str(disk / "store"),
            "--ledger",
            str(disk / "ledger"),
        ]
        yield stack.enter_context(Server(tmp_path_factory.mktemp("server") / "log", *flags))


@contextmanager
def disk_at(folder: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        with suppress(pytest.skip.Exception):
            stack.enter_context(small_disk(folder))
        yield folder


async def operations(server: Server) -> list[tuple[str, str, Json]]:
    """Method, path and what is said of it, but for the pages and the streams without an end."""
    _, specification = await server.get("/openapi.json")
    return [
        (method.upper(), path, said)
        for path, methods in specification["paths"].items()
        for method, said in methods.items()
        if path not in ("/", "/live")
    ]


async def posts(server: Server) -> list[str]:
    return [path for method, path, _ in await operations(server) if method == "POST" and path not in BODYLESS]


def test_the_bodies_here_are_of_all_that_take_one(small: Server) -> None:
    assert set(asyncio.run(posts(small))) == {*SMALL, "/v1/files"}


async def send(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    headers = {"Content-Type": FORM if path == "/v1/files" and method == "POST" else "application/json"}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, server.url + path, data=body, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


def with_number(body: Json, field: str) -> bytes:
    """The body with this field as a number of 5,000 digits."""
    return json.dumps({**body, field: "NUMBER"}).replace('"NUMBER"', DIGITS).encode()


async def test_numbers_of_5000_digits(small: Server) -> None:
    _, specification = await small.get("/openapi.json")
    schemas = specification.get("components", {}).get("schemas", {})
    for path, body in SMALL.items():
        said = specification["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = schemas[said["$ref"].rpartition("/")[2]]["properties"]
        assert fields
        for field in fields:
            status, answer = await send(small, "POST", path, with_number(body, field))
            assert 400 <= status < 500, (path, field, answer)
    nested = (
        ('{"prompt":"a","max_tokens":1,"logit_bias":{"%s":1}}', "/v1/completions"),
        ('{"prompt":"a","max_tokens":1,"logit_bias":{"1":%s}}', "/v1/completions"),
        ('{"prompt":"a","max_tokens":1,"guided_json":{"type":"integer","maximum":%s}}', "/v1/completions"),
        ('{"prompt":"a","max_tokens":1,"guided_json":{"const":%s}}', "/v1/completions"),
        ('{"prompt":[%s],"max_tokens":1}', "/v1/completions"),
        ('{"prompt":"a","max_tokens":1,"metadata":{"a":%s}}', "/v1/completions"),
        ('{"input":"a","max_output_tokens":1,"metadata":{"a":%s}}', "/v1/responses"),
        (
            '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"chat_template_kwargs":{"a":%s}}',
            "/tokenize",
        ),
        (
            '{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":'
            '{"name":"f","parameters":{"maximum":%s}}}],"tool_choice":"required","max_tokens":1}',
            "/v1/chat/completions",
        ),
    )
    for text, path in nested:
        status, answer = await send(small, "POST", path, (text % DIGITS).encode())
        assert status < 500, (text, answer)
    for method, path, _ in await operations(small):
        if method == "GET":
            for query in ("limit", "after", "since", "steps"):
                status, answer = await send(small, method, f"{path.replace('{id}', 'x')}?{query}={DIGITS}")
                assert status < 500, (path, query, answer)
    assert "Traceback" not in small.log


def head(path: str, length: int) -> bytes:
    kind = FORM if path == "/v1/files" else "application/json"
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def connected(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(server.url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def status_of(server: Server, message: bytes) -> int:
    """What a connection is answered that sends this and no more."""
    reader, writer = await connected(server)
    writer.write(message)
    try:
        return int((await asyncio.wait_for(reader.readline(), 30))[9:12])
    finally:
        writer.close()


async def test_a_body_that_does_not_come(small: Server) -> None:
    paths = await posts(small)
    statuses = await asyncio.gather(*(status_of(small, head(path, 1000) + b"{") for path in paths))
    assert dict(zip(paths, statuses, strict=True)) == dict.fromkeys(paths, 408)


async def test_bodies_as_large_as_allowed_from_200_connections(small: Server) -> None:
    """They are no more than there is room for, and health is told meanwhile."""
    for path in await posts(small):
        content = b'{"prompt":"' + b"a" * 1_000_000
        sending = [asyncio.create_task(status_of(small, head(path, 1_040_000) + content)) for _ in range(200)]
        await asyncio.sleep(0.3)
        assert (await small.get("/health/live"))[0] == 200
        statuses = Counter(await asyncio.gather(*sending))
        if path == "/v1/files":  # they are on the disk, if it has room
            assert set(statuses) <= {400, 408, 503}, (path, statuses)
        else:
            assert set(statuses) == {408, 429}, (path, statuses)
            assert statuses[429] > 100, "the few that had a place let others have it when they ended"
    assert "Traceback" not in small.log


async def test_traces_are_a_few_at_a_time(small: Server) -> None:
    """Each slows everybody down."""
    waiting = [asyncio.create_task(send(small, "POST", "/v1/trace?steps=1")) for _ in range(AT_ONCE)]
    await asyncio.sleep(0.5)
    status, answer = await send(small, "POST", "/v1/trace?steps=1")
    assert (status, json.loads(answer)["error"]["code"]) == (429, "too_many_traces")
    assert (await small.post("/v1/completions", SMALL["/v1/completions"]))[0] == 200
    assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * AT_ONCE


async def walk(server: Server, file_id: str) -> dict[tuple[str, str], int]:
    statuses = {}
    for method, path, _ in await operations(server):
        body = None
        if path == "/v1/files" and method == "POST":
            body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            body += (
                b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * 50_000 + b"\r\n--b--\r\n"
            )
        elif path in SMALL and method == "POST":
            body = json.dumps(
                {**SMALL[path], **({"input_file_id": file_id} if "batches" in path else {})}
            ).encode()
        query = "?steps=1" if path == "/v1/trace" else ""
        if path == "/v1/trace":
            continue  # waits for steps
        statuses[method, path], _ = await send(server, method, path.replace("{id}", "x") + query, body)
    return statuses


async def test_a_locked_database_and_a_full_disk(small: Server, disk: Path) -> None:
    content = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    content += b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n--b--\r\n'
    status, answer = await send(small, "POST", "/v1/files", content)
    assert status == 200, answer
    file_id = json.loads(answer)["id"]
    with ExitStack() as stack:
        for name in ("batches/batches.sqlite3", "store", "ledger"):
            database = stack.enter_context(closing(sqlite3.connect(disk / name, isolation_level=None)))
            database.execute("begin exclusive")
        check(await walk(small, file_id))
    if await asyncio.to_thread(disk.is_mount):
        make_room = fill(disk)
        check(await walk(small, file_id))
        make_room()
    assert (await send(small, "POST", "/v1/files", content))[0] == 200
    assert "Traceback" not in small.log


def check(statuses: dict[Any, int]) -> None:
    assert all(status < 500 or status == 503 for status in statuses.values()), statuses
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"):
        assert statuses["POST", path] == 200, (path, "needs no disk")
