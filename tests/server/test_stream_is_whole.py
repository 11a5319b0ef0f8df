"""A stream's pieces make the answer in one piece, whatever was asked, and the tokens' bytes make its text."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server.conftest import MODEL, QWEN
from tests.server.serving import Server
from tests.server.test_tools import TIME, WEATHER, strict

WORDS = ["🎠", "日本語", "हिन्दी", "👩‍👩‍👧‍👦", "naïve", "once", "{", "}", "Paris", "<think>", "العربية", "weather"]
STOPS = ["\n\n", " the", "e", "日", "}"]
COUNTS = [16, pytest.param(200, marks=pytest.mark.prove)]


def random_request(rng: random.Random, *, with_tools: bool) -> dict[str, Any]:
    said = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": f"Say again: {said}"}], "max_tokens": 24}
    fields |= {"temperature": rng.choice([0, 1.0]), "seed": rng.randrange(99)}
    if rng.random() < 0.4:
        fields["stop"] = rng.sample(STOPS, rng.randint(1, 2))
    if with_tools:
        tools = [rng.choice([tool, strict(tool)]) for tool in (WEATHER, TIME)]
        fields |= {"tools": tools, "tool_choice": rng.choice(["auto", "required"])}
        fields["parallel_tool_calls"] = rng.random() < 0.5
    return fields


async def both_ways(client: AsyncOpenAI, model: str, fields: dict[str, Any]) -> None:
    create: Any = client.chat.completions.create
    whole = (await create(model=model, logprobs=True, **fields)).choices[0]
    content, calls, reason, in_bytes = "", [], None, b""
    async for chunk in await create(model=model, logprobs=True, stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for entry in choice.logprobs.content if choice.logprobs else []:
            in_bytes += bytes(entry.bytes)
        for call in choice.delta.tool_calls or []:
            if call.id is not None:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
    assert content == (whole.message.content or ""), fields
    assert calls == [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or []]
    assert reason == whole.finish_reason
    assert in_bytes == b"".join(bytes(entry.bytes) for entry in whole.logprobs.content)
    if not calls and "stop" not in fields and "tools" not in fields:
        assert in_bytes.decode(errors="replace") == content, fields


async def all_of_them(client: AsyncOpenAI, model: str, count: int, *, with_tools: bool) -> None:
    rng = random.Random(count)
    gate = asyncio.Semaphore(16)

    async def one(fields: dict[str, Any]) -> None:
        async with gate:
            await both_ways(client, model, fields)

    await asyncio.gather(*(one(random_request(rng, with_tools=with_tools)) for _ in range(count)))


@pytest.mark.parametrize("count", COUNTS)
async def test_text(async_client: AsyncOpenAI, count: int) -> None:
    await all_of_them(async_client, MODEL, count, with_tools=False)


@pytest.mark.parametrize("count", COUNTS)
async def test_tools(qwen_server: Server, count: int) -> None:
    async with qwen_server.async_client() as client:
        await all_of_them(client, QWEN, count, with_tools=True)
