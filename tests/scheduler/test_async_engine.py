"""AsyncEngine: the real engine process, with the default model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from scheduler import AsyncEngine, EngineConfig, SamplingParams
from scheduler.async_engine import EngineDeadError, EngineStartError
from scheduler.request import FinishReason, InvalidRequestError

REGISTRY = CollectorRegistry()
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(model_path: str) -> AsyncGenerator[AsyncEngine, None]:
    async with AsyncEngine(EngineConfig(model=model_path, dtype="float32"), REGISTRY) as engine:
        yield engine


def gauge(name: str, engine: AsyncEngine) -> float:
    value = REGISTRY.get_sample_value(name, {"model": engine.config.model})
    assert value is not None, name
    return value


async def idle(engine: AsyncEngine) -> None:
    """Wait until the engine has told that nothing runs, nothing waits, and no block is held."""
    names = ("carousel_requests_running", "carousel_requests_waiting", "carousel_kv_cache_usage_ratio")
    async with asyncio.timeout(10):
        while any(gauge(name, engine) for name in names):
            await asyncio.sleep(0.05)


async def test_tokens_come_one_by_one(engine: AsyncEngine) -> None:
    prompt = engine.tokenizer.encode("The capital of France is")
    deltas = [delta async for delta in engine.generate(prompt, GREEDY)]
    assert len(deltas) == 8
    assert "".join(delta.text for delta in deltas).startswith(" Paris.")
    assert [delta.finish_reason for delta in deltas] == [None] * 7 + [FinishReason.LENGTH]


async def test_cancelling_aborts_the_request(engine: AsyncEngine) -> None:
    async def endless() -> None:
        async for _ in engine.generate([5, 6, 7], SamplingParams(max_tokens=4000, ignore_eos=True)):
            pass

    tasks = [asyncio.create_task(endless()) for _ in range(8)]
    while gauge("carousel_requests_running", engine) < 8:
        await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await idle(engine)


async def test_leaving_the_loop_early_aborts_the_request(engine: AsyncEngine) -> None:
    stream = engine.generate([5, 6, 7], SamplingParams(max_tokens=4000, ignore_eos=True))
    async for _ in stream:
        break
    await stream.aclose()
    await idle(engine)


async def test_a_refusal_comes_before_the_first_token(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens is 9000"):
        await anext(engine.generate([1, 2, 3], SamplingParams(max_tokens=9000)))


async def test_the_same_request_id_twice_is_no_conflict(engine: AsyncEngine) -> None:
    async def run() -> list[int]:
        return [delta.token_ids[0] async for delta in engine.generate([1, 2, 3], GREEDY, request_id="same")]

    first, second = await asyncio.gather(run(), run())
    assert first == second


async def test_when_the_engine_dies_its_requests_fail_and_new_ones_are_refused(model_path: str) -> None:
    engine = AsyncEngine(EngineConfig(model=model_path, dtype="float32", kv_cache_memory="64MB"))
    await engine.start()
    try:
        stream = engine.generate([5, 6, 7], SamplingParams(max_tokens=600, ignore_eos=True))
        await anext(stream)
        assert engine._process is not None
        engine._process.kill()
        with pytest.raises(EngineDeadError, match="ended unexpectedly"):
            async for _ in stream:
                pass
        assert engine.error is not None
        with pytest.raises(EngineDeadError):
            await anext(engine.generate([1], GREEDY))
        with pytest.raises(EngineDeadError):
            await engine.record_trace(1)
    finally:
        await engine.stop()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"model": "./no/such/model"}, "no such file or folder"),
        ({"kv_cache_memory": "1MB", "max_model_len": 4096}, "raise --kv-cache-memory"),
    ],
)
async def test_an_engine_that_cannot_start_says_why(
    knobs: dict[str, object], message: str, model_path: str
) -> None:
    engine = AsyncEngine(EngineConfig(**{"model": model_path, **knobs}))  # type: ignore[arg-type]
    with pytest.raises(EngineStartError, match=message):
        await engine.start()
