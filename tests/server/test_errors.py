"""What a client reads when its request is wrong. Everything here is OpenAI's error format."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import MODEL
from tests.server.serving import Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETIONS, b"{", None, "not valid JSON"),
        (COMPLETIONS, b"", None, "not valid JSON"),
        (COMPLETIONS, b'{"prompt": "\xff"}', None, "not valid JSON"),
        (COMPLETIONS, [], None, "must be a JSON object"),
        (COMPLETIONS, {}, "prompt", "prompt is required"),
        (COMPLETIONS, {"prompt": 5}, "prompt", "prompt should be a string, a list of strings"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt", "prompt should be a string, a list of strings"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "the prompt is empty"),
        (COMPLETIONS, {"prompt": []}, "prompt", "prompt is empty"),
        (COMPLETIONS, {"prompt": [10**6]}, "prompt", "token ids outside of 0 to"),
        (COMPLETIONS, {"prompt": ["a"] * 100, "n": 100}, "prompt", "more than 2048"),
        (COMPLETIONS, {"prompt": "a " * 9000}, "prompt", "shorten the prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10**6}, "max_tokens", "lower max_tokens"),
        (
            COMPLETIONS,
            {"prompt": "a", "max_tokens": "many"},
            "max_tokens",
            "a valid integer, got 'many'",
        ),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "between 0 and 100"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p", "above 0"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "between 1 and 128"),
        (COMPLETIONS, {"prompt": "a", "seed": 2**70}, "seed", "64-bit"),
        (COMPLETIONS, {"prompt": "a", "stop": ["b"] * 17}, "stop", "at most 16 strings"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop", "non-empty"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "between 0 and 20"),
        (COMPLETIONS, {"prompt": "a", "suffix": "z"}, "suffix", "not implemented"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", "not implemented"),
        (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, "logprobs", "not implemented"),
        (COMPLETIONS, {"prompt": "a", "colour": "red"}, "colour", "colour is not known"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        (CHAT, {"messages": [{"role": "pet", "content": "miaow"}]}, "messages[0].role", "got 'pet'"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "text parts",
        ),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "not implemented"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "not impl"),
        (CHAT, {"messages": HELLO, "frequency_penalty": 0.5}, "frequency_penalty", "not implemented"),
        (CHAT, {"messages": HELLO, "logit_bias": {"5": 1}}, "logit_bias", "not implemented"),
    ],
)
async def test_a_wrong_request_is_refused_and_told_why(
    server: Server, path: str, body: Any, param: str | None, message: str
) -> None:
    status, answer = await server.post(path, body)
    assert status == 400
    error = answer["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}


async def test_parameters_that_ask_for_nothing_are_accepted(server: Server) -> None:
    status, _ = await server.post(
        CHAT,
        {
            "messages": HELLO,
            "max_tokens": 1,
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "logprobs": False,
            "metadata": {"team": "a"},
            "n": 1,
            "response_format": {"type": "text"},
            "seed": None,
            "service_tier": "auto",
            "stop": None,
            "store": False,
            "stream_options": None,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_k": -1,
            "user": "somebody",
        },
    )
    assert status == 200


def test_the_client_raises_its_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p must be above 0") as refused:
        client.completions.create(model=MODEL, prompt="a", top_p=0)
    assert refused.value.param == "top_p"
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here") as unknown:
        client.completions.create(model="gpt-5", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(model=MODEL, prompt="a " * 9000, stream=True)


async def test_models(client: OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    status, answer = await server.get("/v1/models/some/other")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_unknown_paths_and_methods(server: Server) -> None:
    status, answer = await server.get("/v1/nothing")
    assert (status, answer["error"]["message"]) == (404, "there is nothing at /v1/nothing")
    status, answer = await server.get(COMPLETIONS)
    assert (status, answer["error"]["message"]) == (405, "/v1/completions answers POST, not GET")


async def test_a_body_too_large(server: Server) -> None:
    status, answer = await server.post(COMPLETIONS, b" " * (17 * 1024 * 1024))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert "larger than 7.59 MiB" in answer["error"]["message"], "8192 tokens of 81 characters, twice"


async def test_others_are_not_disturbed(server: Server, async_client: AsyncOpenAI) -> None:
    async def ask() -> str:
        answer = await async_client.completions.create(
            model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=24
        )
        return answer.choices[0].text

    undisturbed = await ask()
    asking = asyncio.create_task(ask())
    for _ in range(10):
        await server.post(COMPLETIONS, b'{"prompt": ')
        await server.post(COMPLETIONS, {"prompt": "a " * 9000})
    assert await asking == undisturbed


async def test_every_response_names_its_request(server: Server) -> None:
    async with aiohttp.ClientSession() as session:

        async def request_id(path: str, **headers: str) -> str:
            async with session.get(server.url + path, headers=headers) as response:
                return response.headers["X-Request-Id"]

        assert await request_id("/health") != await request_id("/health")
        assert await request_id("/v1/models", **{"X-Request-Id": "mine-1"}) == "mine-1"
        assert await request_id("/nothing", **{"X-Request-Id": "mine-2"}) == "mine-2"
        assert await request_id("/health", **{"X-Request-Id": "not sane!"}) != "not sane!"
    assert "[mine-1]" in server.log, "and the access log knows it"
