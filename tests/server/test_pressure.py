"""Sockets and bodies that mean no good: others are served beside them, and in the end they are gone."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import zlib
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.server.serving import Json, Server
from tests.server.users_server import COMPLETIONS

ONE_TOKEN: Json = {"prompt": "Once", "max_tokens": 1}


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    """Eight seats, a queue of eight, and little patience."""
    flags = ["--max-num-seqs", "8", "--max-queued-requests", "8"]
    patience = ["--slow-body-seconds", "2", "--stalled-stream-seconds", "1"]
    with Server(tmp_path_factory.mktemp("tight") / "log", *flags, *patience) as server:
        yield server


def address(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def head(length: int) -> bytes:
    return f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


async def test_bodies_that_do_not_come_take_no_place_and_end(tight: Server) -> None:
    halves = [await asyncio.open_connection(*address(tight)) for _ in range(8)]
    for _, writer in halves:
        writer.write(head(100) + b'{"prompt":')
        await writer.drain()
    assert (await tight.post(COMPLETIONS, ONE_TOKEN))[0] == 200, "the queue is not full of them"
    for reader, writer in halves:
        answer = (await asyncio.wait_for(reader.read(), 30)).decode()
        assert answer.startswith("HTTP/1.1 408 ")
        assert "Connection: close" in answer
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_timeout"
        writer.close()


async def test_an_answer_in_one_piece_that_nobody_reads_is_kept_no_longer_than_a_stream(tight: Server) -> None:
    """It is larger than what the system takes."""
    wish = {"prompt": [*range(100, 1100)], "prompt_logprobs": 20, "n": 16, "max_tokens": 1}
    body = json.dumps(wish).encode()
    before = tight.log.count("nobody has read")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(tight))
        client.sendall(head(len(body)) + body)
        async with asyncio.timeout(120):
            while tight.log.count("nobody has read") == before:
                await asyncio.sleep(0.1)


async def test_streams_that_nobody_reads_end_and_free_their_seats(tight: Server) -> None:
    body = json.dumps(
        {"prompt": "On", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20}
    ).encode()
    before = tight.log.count("nobody has read")
    clients = []
    poller = select.poll()
    for _ in range(8):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(tight))
        client.sendall(head(len(body)) + body)
        poller.register(client, 0)  # tells only when it has ended
        clients.append(client)
    await tight.until("carousel_requests_running", 8)
    ended = 0
    while ended < 8:
        found = await asyncio.to_thread(poller.poll, 60_000)
        assert found, "they do not end"
        ended += len(found)
        for descriptor, _ in found:
            poller.unregister(descriptor)
    await tight.until_idle()
    assert tight.log.count("nobody has read the stream for 1 s") - before == 8
    for client in clients:
        client.close()


async def test_a_slow_reader_gets_all_of_it(tight: Server) -> None:
    body = {"prompt": "On", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 20}
    async with aiohttp.ClientSession() as session, session.post(tight.url + COMPLETIONS, json=body) as response:
        await asyncio.sleep(0.5)  # less than the server's patience
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_bomb_is_not_unpacked(tight: Server, encoding: str) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    bomb = b"".join(packer.compress(b" " * 2**20) for _ in range(256)) + packer.flush()
    headers = {"Content-Encoding": encoding}
    async with (
        aiohttp.ClientSession() as session,
        session.post(tight.url + COMPLETIONS, data=bomb, headers=headers) as response,
    ):
        assert response.status == 415
        assert "Content-Encoding" in (await response.json())["error"]["message"]


async def test_a_body_that_does_not_end_is_too_large(tight: Server) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 2**20
            await asyncio.sleep(0)

    async with aiohttp.ClientSession() as session:
        try:
            async with session.post(tight.url + COMPLETIONS, data=endless()) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "body_too_large"
        except aiohttp.ClientConnectionError:
            pass  # the server has ended it while this client was still sending
    async with asyncio.timeout(30):
        while "POST /v1/completions 413" not in tight.log:
            await asyncio.sleep(0.05)


BROKEN = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\r\nHost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10_000 + b"\r\n\r\n",
]


async def test_broken_messages_leave_a_line_each_and_are_counted(tight: Server) -> None:
    before, counted = tight.log, await tight.metric("carousel_bad_http_requests_total")
    for number in range(100):
        reader, writer = await asyncio.open_connection(*address(tight))
        writer.write(BROKEN[number % len(BROKEN)])
        assert b" 400 " in await reader.readline()
        writer.close()
    assert await tight.metric("carousel_bad_http_requests_total") == counted + 100
    lines = tight.log.removeprefix(before).splitlines()
    assert 1 <= len(lines) <= 100
    assert "Traceback" not in tight.log
