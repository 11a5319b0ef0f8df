"""More connections than there may be: who is served keeps theirs, and who only holds one makes room."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL
from tests.server.serving import Server


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(1)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


@pytest.mark.prove
def test_idle_connections_make_room_and_busy_ones_do_not(tmp_path: Path) -> None:
    with Server(tmp_path / "log", "--dtype", "float32", "--max-connections", "6") as server:
        address = server.url.removeprefix("http://").split(":")
        held = [socket.create_connection((address[0], int(address[1]))) for _ in range(6)]
        for number, connection in enumerate(held):
            if number % 2:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: ")  # and no more of it
        for _ in range(3):
            with urllib.request.urlopen(f"{server.url}/health") as answer:
                assert answer.status == 200
        assert [is_open(connection) for connection in held[:1] + held[-1:]] == [False, True]
        with server.client() as client:
            streams = [
                client.completions.create(
                    model=MODEL,
                    prompt="On",
                    max_tokens=100,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                for _ in range(6)
            ]
            for stream in streams:
                next(stream)
            assert not any(map(is_open, held))
            with pytest.raises(openai.InternalServerError, match="6 connections") as refused:
                client.models.list()
            assert refused.value.code == "too_many_connections"
            assert refused.value.response.headers["retry-after"] == "1"
            ends = [list(stream)[-1].usage for stream in streams]
            assert [end.completion_tokens for end in ends if end is not None] == [100] * 6
            assert client.models.list().data
        assert "Traceback" not in server.log


def test_who_does_not_read_makes_room_without_a_word(tmp_path: Path, model_path: str) -> None:
    with Server(tmp_path / "log", "--dtype", "float32", "--max-connections", "6") as server:
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(6):
            held = []
            for _ in range(6):
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((host, int(port)))
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
                held.append(client)
            time.sleep(0.2)
            for client in held:
                client.close()
        for _ in range(20):
            with urllib.request.urlopen(f"{server.url}/health") as answer:
                assert answer.status == 200
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


def asked(server: Server, **fields: Any) -> socket.socket:
    """A connection on which an answer was asked for, whose client has ended its own side."""
    body = json.dumps({"prompt": "One", "max_tokens": 200, "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head.encode() + body)
    connection.shutdown(socket.SHUT_WR)
    return connection


@pytest.mark.parametrize("max_tokens", [1, 200])
def test_who_sends_nothing_more_gets_the_answer(server: Server, max_tokens: int) -> None:
    with asked(server, max_tokens=max_tokens) as connection:
        reader = http.client.HTTPResponse(connection)
        reader.begin()
        assert reader.status == 200
        assert json.loads(reader.read())["usage"]["completion_tokens"] == max_tokens
        assert connection.recv(1) == b""  # nothing more can come, so the server ends it too
    with asked(server, max_tokens=max_tokens, stream=True) as connection:
        assert b"data: [DONE]" in connection.makefile("rb").read()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_is_gone_is_found_out(server: Server, stream: bool) -> None:
    connection = asked(server, max_tokens=8000, stream=stream)
    await server.until("carousel_requests_running", 1)
    connection.close()
    await server.until_idle()


def test_half_a_request_is_none(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
        b"GET /hea",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
