"""AsyncEngine: the real engine process, with the default model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
import zmq.asyncio
from prometheus_client import CollectorRegistry

from scheduler import AsyncEngine, EngineConfig, SamplingParams
from scheduler.engine.client import EngineDeadError, EngineStartError
from scheduler.engine.core import EngineCore
from scheduler.engine.process import EngineLoop
from scheduler.engine.stream import Delta, RequestStream
from scheduler.messages import RecordTrace, SequenceOutput, StepStats, ToEngine
from scheduler.request import FinishReason
from scheduler.sampling_params import InvalidRequestError

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
    with pytest.raises(InvalidRequestError, match="9000 in the answer"):
        await anext(engine.generate([1, 2, 3], SamplingParams(max_tokens=9000)))


async def test_the_same_request_id_twice_is_no_conflict(engine: AsyncEngine) -> None:
    async def run() -> list[int]:
        return [delta.token_ids[0] async for delta in engine.generate([1, 2, 3], GREEDY, request_id="same")]

    first, second = await asyncio.gather(run(), run())
    assert first == second


async def test_a_listener_that_fails_costs_nobody_a_token(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(step: StepStats) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "listeners", [listener])
    async with asyncio.timeout(30):
        deltas = [delta async for delta in engine.generate([1, 2, 3], GREEDY)]
    assert sum(len(delta.token_ids) for delta in deltas) == 8
    assert "Traceback" in caplog.text
    await idle(engine)


async def test_an_output_that_cannot_be_handed_out_ends_its_own_request(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = RequestStream.push

    def picky(stream: RequestStream, output: SequenceOutput) -> Delta | None:
        if output.request_id.startswith("bad"):
            raise ZeroDivisionError
        return push(stream, output)

    async def run(name: str) -> int:
        return sum([len(delta.token_ids) async for delta in engine.generate([1, 2], GREEDY, request_id=name)])

    monkeypatch.setattr(RequestStream, "push", picky)
    async with asyncio.timeout(30):
        good, bad = await asyncio.gather(run("good"), run("bad"), return_exceptions=True)
    assert good == 8
    assert isinstance(bad, ZeroDivisionError)
    await idle(engine)


async def test_a_recording_that_nobody_waits_for_ends(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[ToEngine] = []
    send = engine._send

    async def spy(message: ToEngine) -> None:
        sent.append(message)
        await send(message)

    monkeypatch.setattr(engine, "_send", spy)
    recording = asyncio.create_task(engine.record_trace(10**6))
    while not sent:
        await asyncio.sleep(0)
    recording.cancel()
    await asyncio.gather(recording, return_exceptions=True)
    (first, last) = cast(list[RecordTrace], sent)
    assert (last.number, last.num_steps) == (first.number, 0)
    assert not engine._recordings
    again = asyncio.create_task(engine.record_trace(1))
    assert [delta async for delta in engine.generate([1, 2, 3], GREEDY)]
    assert b'"step 1"' in await again
    assert not engine._recordings


def test_the_engine_forgets_a_recording() -> None:
    core: Any = SimpleNamespace(observers=[], has_work=False)
    loop = EngineLoop(cast(EngineCore, core), lambda _: None)
    loop._take(RecordTrace(1, 100))
    loop._take(RecordTrace(2, 100))
    loop._take(RecordTrace(1, 0))
    loop._take(RecordTrace(7, 0))
    assert core.observers == list(loop._recordings.values())
    assert list(loop._recordings) == [2]


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


def kill_unseen(engine: AsyncEngine) -> None:
    assert engine._process is not None
    engine._process.kill()
    time.sleep(1)  # the event loop hears of it later, the sockets at once


async def test_nothing_waits_for_an_engine_that_died_unseen(model_path: str) -> None:
    """Between the process's end and the news of it, what is sent has no taker."""
    engine = AsyncEngine(EngineConfig(model=model_path, dtype="float32", kv_cache_memory="64MB"))
    await engine.start()
    async with asyncio.timeout(30):
        try:
            kill_unseen(engine)
            with pytest.raises(EngineDeadError, match="ended unexpectedly"):
                await anext(engine.generate([5, 6, 7], GREEDY))
        finally:
            await engine.stop()


async def test_stopping_does_not_wait_for_an_engine_that_died_unseen(model_path: str) -> None:
    engine = AsyncEngine(EngineConfig(model=model_path, dtype="float32", kv_cache_memory="64MB"))
    await engine.start()
    kill_unseen(engine)
    async with asyncio.timeout(30):
        await engine.stop()


async def test_a_message_that_is_none_is_no_silence(model_path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncEngine(EngineConfig(model=model_path, dtype="float32", kv_cache_memory="64MB")) as engine:
        stream = engine.generate([5, 6, 7], SamplingParams(max_tokens=600, ignore_eos=True))
        await anext(stream)
        recording = asyncio.create_task(engine.record_trace(10**6))
        with zmq.asyncio.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.connect(f"ipc://{engine._socket_folder.name}/outputs")
            await stranger.send(b"\xc1")
            async with asyncio.timeout(30):
                with pytest.raises(EngineDeadError, match="receiving from the engine's process failed"):
                    async for _ in stream:
                        pass
        with pytest.raises(EngineDeadError):
            await recording
        assert engine.error is not None
        assert "Traceback" in caplog.text
        assert not engine._clients
        assert not engine._recordings


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
    engine = AsyncEngine(EngineConfig(**{"model": model_path, **knobs}))
    with pytest.raises(EngineStartError, match=message):
        await engine.start()
