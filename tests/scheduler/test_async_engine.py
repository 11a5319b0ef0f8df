"""AsyncEngine: the real engine process, with the default model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from scheduler import AsyncEngine, EngineConfig, SamplingParams
from scheduler.client.async_engine import EngineStartError
from scheduler.client.stream import Delta, RequestStream
from scheduler.client.supervisor import Supervisor
from scheduler.core.request import FinishReason, InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.process.engine_core import EngineCore
from scheduler.process.loop import EngineLoop
from scheduler.text.grammar_checker import TOO_MUCH_WORK
from scheduler.wire.messages import RecordTrace, SequenceOutput, Shutdown, StepStats, ToEngine
from scheduler.wire.pulse import Pulse
from tests.scheduler.test_grammar_checker import chain

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


@pytest.mark.parametrize(
    ("tokens", "params"),
    [([5, True], GREEDY), ([5, 1.5], GREEDY), ([5, "a"], GREEDY), ([5], SamplingParams(top_k=1.5))],  # type: ignore[arg-type]
)
async def test_what_the_engine_could_not_read_never_gets_there(
    engine: AsyncEngine, tokens: list[int], params: SamplingParams
) -> None:
    """It would end of it, and the next one too."""
    pid = engine.pid
    with pytest.raises((InvalidRequestError, TypeError)):
        async for _ in engine.generate(tokens, params):
            pass
    assert [delta async for delta in engine.generate([5, 6], GREEDY)]
    assert engine.pid == pid


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
    with pytest.raises(InvalidRequestError, match="9000 in the prompt, 1 in the answer"):
        await anext(engine.generate([1] * 9000, SamplingParams(max_tokens=9000)))


async def test_a_grammar_that_would_end_the_engine_is_refused(engine: AsyncEngine) -> None:
    bottomless = GrammarSpec(GrammarKind.LARK, chain("r", 3000, '"x" {}'))
    process = engine.pid
    with pytest.raises(InvalidRequestError, match=TOO_MUCH_WORK):
        await anext(engine.generate([1, 2, 3], msgspec.structs.replace(GREEDY, grammar=bottomless)))
    assert engine.pid == process


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
    send = Supervisor.send

    async def spy(supervisor: Supervisor, message: ToEngine) -> None:
        sent.append(message)
        await send(supervisor, message)

    monkeypatch.setattr(Supervisor, "send", spy)
    recording = asyncio.create_task(engine.record_trace(10**6))
    while not sent:
        await asyncio.sleep(0)
    recording.cancel()
    await asyncio.gather(recording, return_exceptions=True)
    (first, last) = cast(list[RecordTrace], sent)
    assert (last.number, last.num_steps) == (first.number, 0)
    again = asyncio.create_task(engine.record_trace(1))
    assert [delta async for delta in engine.generate([1, 2, 3], GREEDY)]
    assert b'"step 1"' in await again


def test_the_engine_forgets_a_recording() -> None:
    core: Any = SimpleNamespace(observers=[], has_work=False)
    loop = EngineLoop(cast(EngineCore, core), lambda _: None, cast(Pulse, None))

    def tell(*messages: ToEngine) -> None:
        coming = [msgspec.msgpack.encode(message) for message in (*messages, Shutdown())]
        loop.run(cast(Any, SimpleNamespace(poll=lambda _: True, recv=lambda: coming.pop(0))))

    tell(RecordTrace(1, 100), RecordTrace(2, 100), RecordTrace(1, 0), RecordTrace(7, 0))
    assert len(core.observers) == 1
    tell(RecordTrace(2, 0))
    assert core.observers == []


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
