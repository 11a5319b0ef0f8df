"""A client that leaves takes its request along: at once, and from wherever it is."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI

from tests.server.conftest import MODEL
from tests.server.serving import Server


async def drain(client: AsyncOpenAI, prompt: str | list[str], *, stream: bool) -> None:
    """Ask for an answer that takes minutes, and read all of it."""
    create = client.completions.create
    if stream:
        async for _ in await create(
            model=MODEL, prompt=prompt, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        ):
            pass
    else:
        await create(model=MODEL, prompt=prompt, max_tokens=4000, extra_body={"ignore_eos": True})


async def test_half_of_the_clients_leave_midway(server: Server, async_client: AsyncOpenAI) -> None:
    async def read(place: int, *, leave: bool) -> str | None:
        chunks = await async_client.completions.create(
            model=MODEL,
            prompt=f"The {place}th of all",
            max_tokens=4000 if leave else 8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        finish_reason = None
        async for chunk in chunks:
            finish_reason = chunk.choices[0].finish_reason
            if leave:
                break
        await chunks.close()
        return finish_reason

    readers = [read(place, leave=place % 2 == 0) for place in range(64)]
    assert await asyncio.gather(*readers) == [None, "length"] * 32
    await server.until_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["One", ["One", "Two"]])
async def test_one_that_does_not_wait_for_the_answer(
    server: Server, async_client: AsyncOpenAI, prompt: str | list[str], stream: bool
) -> None:
    asking = asyncio.create_task(drain(async_client, prompt, stream=stream))
    await server.until("carousel_requests_running", 1 if isinstance(prompt, str) else 2)
    asking.cancel()
    await server.until_idle()
    await server.until_logged("POST /v1/completions 499")


async def test_one_that_waits_in_the_queue(server: Server, async_client: AsyncOpenAI) -> None:
    seats = 64
    seated = asyncio.create_task(drain(async_client, ["One"] * seats, stream=True))
    await server.until("carousel_requests_running", seats)
    queued = asyncio.create_task(drain(async_client, "Two", stream=True))
    await server.until("carousel_requests_waiting", 1)
    queued.cancel()
    await server.until("carousel_requests_waiting", 0)
    assert await server.metric("carousel_requests_running") == seats, "who has a seat keeps it"
    seated.cancel()
    await server.until_idle()
