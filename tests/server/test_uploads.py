"""Files that come slowly, in the wrong form, in great number, or not to their end."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from server.batches.store import MAX_FILES
from tests.server.serving import Server

B = b"--b\r\n"
FILE = b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
STALLED = {
    "nothing": b"",
    "a preamble": b"some words\r\n",
    "half a boundary": b"--",
    "half a head": B + b"Content-Disposition: form-da",
    "a head without an end": B + b"Content-Disposition: form-data\r\n",
    "half a purpose": B + b'Content-Disposition: form-data; name="purpose"\r\n\r\nbat',
    "half a field that is not known": B + b'Content-Disposition: form-data; name="more"\r\n\r\nwords',
    "half a file": B + PURPOSE + B + FILE + b"{}",
}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    """Little patience, few connections, and a folder that was there before."""
    folder = tmp_path_factory.mktemp("hasty")
    (folder / "batches").mkdir(mode=0o755)
    (folder / "batches" / "file-0123").write_text("of an upload that was cut off")
    (folder / "batches" / "notes").write_text("somebody's")
    flags = ["--batches", str(folder / "batches"), "--slow-body-seconds", "1", "--max-connections", "20"]
    with Server(folder / "log", *flags, "--dtype", "float32", "--kv-cache-memory", "64MB") as server:
        yield server


def folder_of(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "hasty0" / "batches"


def head(length: int) -> bytes:
    kind = b"Content-Type: multipart/form-data; boundary=b\r\n"
    return b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n" % (kind, length)


async def connected(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(server.url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def upload(server: Server, content: bytes) -> tuple[int, str]:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{server.url}/v1/files", data=content) as answer,
    ):
        return answer.status, await answer.text()


@pytest.mark.parametrize("drips", [False, True], ids=["stops", "drips"])
@pytest.mark.parametrize("sent", STALLED.values(), ids=STALLED.keys())
async def test_a_form_that_does_not_come_ends(hasty: Server, sent: bytes, drips: bool) -> None:
    reader, writer = await connected(hasty)
    writer.write(head(1_000_000) + sent)

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.2)
            writer.write(b"x")

    dripping = asyncio.create_task(drip()) if drips else None
    answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    if dripping is not None:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    writer.close()


async def test_health_is_told_while_all_connections_are_held(hasty: Server) -> None:
    held = []
    for _ in range(20):
        held.append(await connected(hasty))
        held[-1][1].write(head(1_000_000))
        await asyncio.sleep(0.01)  # until something is asked on it
    statuses = {}
    for path in ("/v1/models", "/health/live", "/health/ready", "/v1/models"):
        statuses[path] = (await hasty.get(path))[0]
    assert statuses == {"/v1/models": 503, "/health/live": 200, "/health/ready": 200}
    for reader, writer in held:
        await asyncio.wait_for(reader.read(), 30)
        writer.close()


async def test_names_and_numbers_that_are_none(hasty: Server) -> None:
    for content in (
        B + PURPOSE + B + FILE.replace(b'"x"', b'"\xff"') + b"{}\r\n--b--\r\n",
        B + PURPOSE + B + FILE.replace(b'"file"', b'"\xff"') + b"{}\r\n--b--\r\n",
    ):
        status, said = await upload(hasty, content)
        assert status in (200, 400), said
    digits = "1" + "0" * 4999
    for path in ("/v1/files?limit=", "/v1/batches?limit=", "/v1/trace?steps="):
        method = "POST" if "trace" in path else "GET"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{hasty.url}{path}{digits}") as answer,
        ):
            assert answer.status == 400, path
            assert "should be a number from 1 to 10000" in await answer.text()
    assert (await hasty.get("/v1/files/%ff"))[0] == 404
    assert "Traceback" not in hasty.log


async def test_who_leaves_in_the_middle_leaves_a_line_and_nothing_else(
    hasty: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of(hasty, tmp_path_factory)
    before = set(folder.iterdir())
    for sent in STALLED.values():
        _, writer = await connected(hasty)
        writer.write(head(1_000_000) + sent)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
    async with asyncio.timeout(10):
        while hasty.log.count("POST /v1/files 499") < len(STALLED):
            await asyncio.sleep(0.05)
    assert set(folder.iterdir()) == before
    assert "Traceback" not in hasty.log


async def test_files_are_their_owners_and_what_an_upload_left_is_gone(
    hasty: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of(hasty, tmp_path_factory)
    assert (await upload(hasty, B + PURPOSE + B + FILE + b"{}\r\n--b--\r\n"))[0] == 200
    modes = {path.name.partition("-")[0]: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes.pop("notes") == 0o666 & ~current_umask()
    assert modes["file"] == 0o600
    assert set(modes.values()) == {0o600}
    assert not (folder / "file-0123").exists()
    assert "batches is open to others (mode 755)" in hasty.log


async def test_many_uploads_at_once_are_no_more_files_than_there_may_be(hasty: Server) -> None:
    gate = asyncio.Semaphore(15)

    async def one() -> int:
        async with gate:
            return (await upload(hasty, B + PURPOSE + B + FILE + b"{}\r\n--b--\r\n"))[0]

    statuses = Counter(await asyncio.gather(*(one() for _ in range(MAX_FILES + 40))))
    assert set(statuses) == {200, 400}
    _, found = await hasty.get("/v1/files?limit=10000")
    assert len(found["data"]) <= MAX_FILES


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
