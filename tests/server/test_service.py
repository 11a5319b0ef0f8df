"""What is around the answers: tokens, names, versions, browsers, proxies, and messages that are no requests."""

from __future__ import annotations

import asyncio
import codecs
import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from openai import NotFoundError, OpenAI

from scheduler.text.tokenizer import Tokenizer
from tests.server.conftest import MODEL, ORIGIN
from tests.server.serving import Server

HELLO = [{"role": "user", "content": "Hello"}]


async def test_tokens_of_texts_and_of_conversations(server: Server, tokenizer: Tokenizer) -> None:
    text = "naïve café 🎠"
    _, tokens = await server.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert tokens["tokens"] == tokenizer.encode(text)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 8192
    assert await server.post("/detokenize", {"tokens": tokens["tokens"]}) == (200, {"prompt": text})
    _, tokens = await server.post("/tokenize", {"messages": HELLO})
    assert tokens["tokens"] == tokenizer.apply_chat_template(HELLO)
    for path, body, param in [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [5] * 9000}, "tokens"),
    ]:
        status, answer = await server.post(path, body)
        assert (status, answer["error"]["param"]) == (400, param)


async def test_who_is_there(server: Server) -> None:
    assert (await server.get("/version"))[1].keys() == {"version"}
    assert await server.get("/ping") == (200, {"status": "ok"})
    idle = (200, {"server_load": 0})
    for _ in range(100):  # what a test before this one left behind has yet to end
        if await server.get("/load") == idle:
            break
        await asyncio.sleep(0.1)
    assert await server.get("/load") == idle
    _, models = await server.get("/v1/models")
    assert models["data"][0]["root"] == MODEL


async def test_the_specification_is_of_what_is_validated(server: Server) -> None:
    _, document = await server.get("/openapi.json")
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert {"temperature", "structured_outputs", "logit_bias"} <= chat["properties"].keys()


def test_each_of_its_names(dressed_server: Server) -> None:
    with dressed_server.client() as client:
        assert [model.id for model in client.models.list()] == ["fast", "slow", "claude-mine"]
        for name in ("fast", "slow", "claude-mine"):
            assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
        with pytest.raises(NotFoundError, match="'gpt-5' is not served here") as refused:
            client.completions.create(model="gpt-5", prompt="a")
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 1}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
async def test_a_model_of_another_name_is_answered_by_the_one_there_is(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    for name in ("claude-opus-9", ""):
        status, answer = await server.post(path, body | {"model": name})
        assert (status, answer["model"]) == (200, MODEL)
    await server.post(path, body | {"model": "evil\n2026-11-30 ERROR"})
    assert server.log.count("model 'claude-opus-9', which is not here") == 1
    assert "evil\\n2026" in server.log


async def test_under_a_path_of_a_proxy(dressed_server: Server) -> None:
    async with aiohttp.ClientSession(dressed_server.url) as session:
        for path in ("/carousel/v1/models", "/v1/models", "/carousel/health"):
            async with session.get(path) as response:
                assert response.status == 200, path
        for path in ("/carousel", "/carousel/", "/"):
            async with session.get(path) as response:
                assert '<base href="/carousel/">' in await response.text(), path
    with OpenAI(base_url=f"{dressed_server.url}/carousel/v1", api_key="x") as client:
        assert client.completions.create(model="fast", prompt="a", max_tokens=1).choices


async def test_a_browsers_preflight(dressed_server: Server, server: Server) -> None:
    asks = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    chat, sent = "/v1/chat/completions", {"Origin": ORIGIN}
    async with aiohttp.ClientSession(dressed_server.url) as session:
        async with session.options(chat, headers=asks) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert response.headers["Access-Control-Allow-Headers"] == "content-type"
        async with session.options(chat, headers=asks | {"Origin": "https://evil.example"}) as other:
            assert other.status == 403
            assert "Access-Control-Allow-Origin" not in other.headers
        body = {"messages": HELLO, "max_tokens": 2, "stream": True}
        async with session.post(chat, json=body, headers=sent) as response:
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        async with session.post(chat, json={}, headers=sent) as refused:
            assert refused.status == 400
            assert refused.headers["Access-Control-Allow-Origin"] == ORIGIN
    async with aiohttp.ClientSession(server.url) as session, session.options(chat, headers=asks) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_page_may_ask_for_a_server_near_it(dressed_server: Server) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    async with aiohttp.ClientSession(dressed_server.url) as session:
        async with session.options("/v1/models", headers=asks | {"Origin": ORIGIN}) as response:
            assert response.headers["Access-Control-Allow-Private-Network"] == "true"
        async with session.options("/v1/models", headers=asks | {"Origin": "https://evil.example"}) as other:
            assert other.status == 403
            assert "Access-Control-Allow-Private-Network" not in other.headers


async def test_what_the_tokenizer_is(server: Server, tokenizer: Tokenizer) -> None:
    _, said = await server.get("/tokenizer_info")
    assert said["tokenizer_class"]
    assert said["model_max_length"] == 8192
    assert said["chat_template"] == tokenizer.chat_template.source
    for number, token in said["added_tokens_decoder"].items():
        assert tokenizer.token_text(int(number)) == token["content"]
        assert isinstance(token["special"], bool)
    assert said["eos_token"] in [token["content"] for token in said["added_tokens_decoder"].values()]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat///completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/completions/", "/v1/completions"),
        ("/v1/nothing/", None),
        ("/v2/chat/completions", None),
    ],
)
def test_a_path_that_is_none_is_named(server: Server, path: str, meant: str | None) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
    connection.request("POST", path, body="{}", headers={"Content-Type": "application/json"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    assert answer.status == 404
    assert error["message"] == f"there is nothing at {path}" + (f"; did you mean {meant}?" if meant else "")


async def test_a_mark_of_the_byte_order_and_an_empty_model(server: Server) -> None:
    body = codecs.BOM_UTF8 + b'{"prompt": "a", "max_tokens": 1, "model": ""}'
    status, answer = await server.post("/v1/completions", body)
    assert status == 200, answer
    assert answer["model"] == MODEL


async def test_head(server: Server) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        for path in ("/", "/health", "/v1/models"):
            async with session.head(path) as response:
                assert response.status == 200, path
                assert await response.read() == b""


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: tea\r\nContent-Length: 2\r\n\r\n{}", 417),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_answered_in_json(server: Server, message: bytes, status: int) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(message)
        answer = b""
        while b'"code"' not in answer and (part := connection.recv(65536)):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}".encode()) or head.startswith(f"HTTP/1.0 {status}".encode())
    assert b"application/json" in head
    assert body.startswith(b'{"error":{"message":"')


def test_continue_is_said(server: Server) -> None:
    address = urlsplit(server.url)
    body = b'{"prompt": "a", "max_tokens": 1}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
