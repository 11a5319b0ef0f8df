"""What a client reads when its request is wrong. Everything here is OpenAI's error format."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from scheduler.observing.logs import TEXT, OneLine
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
        (
            COMPLETIONS,
            {"prompt": "a", "max_tokens": "many"},
            "max_tokens",
            "a valid integer, got 'many'",
        ),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "between 0 and 100"),
        (COMPLETIONS, {"prompt": "a", "top_p": -0.1}, "top_p", "between 0 and 1"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "between 1 and 128"),
        (COMPLETIONS, {"prompt": "a", "seed": 2**70}, "seed", "64-bit"),
        (COMPLETIONS, {"prompt": "a", "stop": ["b"] * 17}, "stop", "at most 16 strings"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop", "non-empty"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "between 0 and 20"),
        (COMPLETIONS, {"prompt": "a", "suffix": "z"}, "suffix", "no tokens to fill in the middle"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3, "stream": True}, "best_of", "cannot be streamed"),
        (COMPLETIONS, {"prompt": "a", "best_of": 1, "n": 2}, "best_of", "not be less than n"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "an object of token ids"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"49152": 1}}, "logit_bias", "outside of 0 to 49151"),
        (COMPLETIONS, {"prompt": "a", "allowed_token_ids": [49152]}, "allowed_token_ids", "outside of"),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 2.1}, "presence_penalty", "between -2 and 2"),
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": 1e-20}, "repetition_penalty", "between 0.01 and 100"),
        (COMPLETIONS, {"prompt": "a", "repetition_penalty": 1e20}, "repetition_penalty", "between 0.01 and 100"),
        (COMPLETIONS, {"prompt": "a", "bad_words": [""]}, "bad_words", "non-empty"),
        (COMPLETIONS, {"prompt": "a", "bad_words": ["x"] * 129}, "bad_words", "at most 128"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "n": 11}, "n", "10 beams at most"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "stream": True}, "stream", "cannot be streamed"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "logprobs": 1}, "logprobs", "does not go with"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "max_tokens": 0}, "max_tokens", "a token at least"),
        (COMPLETIONS, {"prompt": "a", "length_penalty": 2}, "length_penalty", "use_beam_search: true only"),
        (
            COMPLETIONS,
            {"prompt": "a", "logprobs": 20, "n": 128, "max_tokens": 4000},
            "logprobs",
            "or stream it",
        ),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"content": "miaow"}]}, "messages[0].role", "is required"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "reads text",
        ),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (CHAT, {"messages": HELLO, "chat_template": "hi"}, "chat_template", "--trust-request-chat-template"),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 9000}]}, "messages", "shorten the prompt"),
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
            "skip_special_tokens": True,
            "add_special_tokens": False,
            "include_stop_str_in_output": False,
            "add_generation_prompt": True,
            "chat_template_kwargs": {},
            "length_penalty": 1.0,
            "use_beam_search": False,
            "best_of": 1,
            "typical_p": 1.0,
            "mm_processor_kwargs": None,
            "kv_transfer_params": None,
            "vllm_xargs": {},
            "request_id": "mine",
            "reasoning_effort": "low",
            "verbosity": "low",
        },
    )
    assert status == 200


def test_the_client_raises_its_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p must be between 0 and 1") as refused:
        client.completions.create(model=MODEL, prompt="a", top_p=2)
    assert refused.value.param == "top_p"
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here") as unknown:
        client.models.retrieve("gpt-5")
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


async def test_nothing_that_is_sent_looks_like_a_line_of_the_log(server: Server) -> None:
    line = "evil\n2026-11-30 12:00:00,000 ERROR server: \x1b[31mforged\x1b[0m\x9b"
    for body in ({"prompt": "a", line: 1}, {"prompt": "a", "model": line}, {"prompt": "a", "request_id": line}):
        await server.post(COMPLETIONS, body)
    async with aiohttp.ClientSession() as session:
        await session.get(server.url + "/%0aforged", headers={"X-Request-Id": "forged"})
    assert not any(
        "forged" in text and text.startswith("2026-11-30 12:00:00,000") for text in server.log.split("\n")
    )
    assert "\x1b" not in server.log


def test_a_log_has_a_line_for_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = OneLine(TEXT)
    try:
        raise ValueError("evil\nERROR forged \x1b[31m")
    except ValueError:
        record = logging.makeLogRecord({"msg": "evil\r\nERROR forged", "exc_info": sys.exc_info()})
    said = formatter.format(record)
    assert "\x1b" not in said
    assert "\r" not in said
    first, *others = said.split("\n")
    assert first.endswith(r"evil\r\nERROR forged")
    assert all(other.startswith("  ") for other in others)


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
    await server.until_logged("[mine-1]")
