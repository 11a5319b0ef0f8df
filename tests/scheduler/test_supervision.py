"""The engine's process dies or hangs, and nobody's answer is another: real processes, with the default model."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from scheduler import AsyncEngine, EngineConfig, SamplingParams
from scheduler.client.async_engine import Delta, EngineDeadError, Phase, RequestCrashedError
from scheduler.client.handle import EngineProcess
from scheduler.client.suspects import Suspects
from scheduler.core.request import FinishReason
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.process.loop import TEST_HOOK
from scheduler.wire.messages import Launch
from tests.scheduler import failing_engine

KNOBS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "64MB"}
EMBED = SamplingParams(max_tokens=0, pooling="mean")
LONG = SamplingParams(temperature=0.8, max_tokens=160, seed=7, ignore_eos=True, logprobs=1)


@asynccontextmanager
async def engine_of(model_path: str, **knobs: Any) -> AsyncIterator[AsyncEngine]:
    registry = CollectorRegistry()
    async with AsyncEngine(EngineConfig(model=model_path, **{**KNOBS, **knobs}), registry) as engine:
        yield engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where temporary files go."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("temporary")
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(model_path: str, folder: Path) -> AsyncGenerator[AsyncEngine, None]:
    async with engine_of(model_path) as engine:
        yield engine


def pid(engine: AsyncEngine) -> int:
    assert engine.pid is not None
    return engine.pid


async def is_ready(engine: AsyncEngine) -> None:
    async with asyncio.timeout(60):
        while engine.phase is not Phase.READY:
            await asyncio.sleep(0.05)


class Answer:
    """One request, read as it comes."""

    def __init__(self, engine: AsyncEngine, prompt: list[int], params: SamplingParams, **more: Any) -> None:
        self.deltas: list[Delta] = []
        self.task = asyncio.create_task(self._read(engine.generate(prompt, params, **more)))

    async def _read(self, stream: AsyncGenerator[Delta, None]) -> None:
        async for delta in stream:
            self.deltas.append(delta)

    async def has(self, num_tokens: int) -> None:
        async with asyncio.timeout(60):
            while sum(len(delta.token_ids) for delta in self.deltas) < num_tokens:
                await asyncio.sleep(0.005)

    async def whole(self) -> list[tuple[int, str, list[int], list[Any], FinishReason | None]]:
        """By sequence: text, tokens, logprobs, and how it ended."""
        async with asyncio.timeout(120):
            await self.task
        found = []
        for index in sorted({delta.index for delta in self.deltas}):
            own = [delta for delta in self.deltas if delta.index == index]
            found.append(
                (
                    index,
                    "".join(delta.text for delta in own),
                    [token for delta in own for token in delta.token_ids],
                    [logprobs for delta in own for logprobs in delta.result.logprobs],
                    own[-1].finish_reason,
                )
            )
        return found


WISHES = [
    LONG,
    msgspec.structs.replace(LONG, n=2, seed=8),
    msgspec.structs.replace(LONG, frequency_penalty=0.4, stop=("zzz",), seed=9),
    msgspec.structs.replace(LONG, grammar=GrammarSpec(GrammarKind.REGEX, r"([a-z]+ ){200}"), seed=10),
    msgspec.structs.replace(LONG, prompt_logprobs=1, seed=11),
]


async def test_a_killed_engine_costs_nobody_a_bit(
    engine: AsyncEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Launch] = []
    launch = EngineProcess.launch

    def record(process: EngineProcess, what: Launch) -> None:
        launched.append(what)
        launch(process, what)

    monkeypatch.setattr(EngineProcess, "launch", record)
    prompt = engine.tokenizer.encode("Once upon a time there was a")
    wishes = [msgspec.structs.replace(wish, max_tokens=80) for wish in WISHES]
    expected = await asyncio.gather(*(Answer(engine, prompt, wish).whole() for wish in wishes))
    before = pid(engine)
    answers = [Answer(engine, prompt, wish) for wish in wishes]
    for number in range(2):
        for answer in answers:
            await answer.has(20 * (number + 1))
        os.kill(pid(engine), signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert engine.error is not None
        assert "a new one is starting" in engine.error
        late = Answer(engine, prompt, wishes[0])  # it waits for the next engine
        await is_ready(engine)
    assert [await answer.whole() for answer in answers] == expected
    assert await late.whole() == expected[0]
    assert pid(engine) != before
    assert [each.config["kv_cache_memory"] for each in launched] == [engine.info.pool_bytes] * 2, "as many blocks"
    registry = engine.metrics.registry
    lost = registry.get_sample_value("carousel_engine_lost_total", {"model": engine.config.model})
    assert lost == 2
    assert engine.num_in_flight == 0
    assert not await asyncio.to_thread(os.listdir, folder), "nothing is left in the temporary folder"


@pytest.mark.prove
async def test_a_stopped_engine_is_taken_to_hang(engine: AsyncEngine) -> None:
    prompt = engine.tokenizer.encode("Once upon a time there was a")
    expected = await Answer(engine, prompt, LONG).whole()
    answer = Answer(engine, prompt, LONG)
    await answer.has(10)
    late = Answer(engine, prompt, LONG, deadline=asyncio.get_running_loop().time() + 1)
    stopped = pid(engine)
    os.kill(stopped, signal.SIGSTOP)
    ((_, _, _, _, reason),) = await late.whole()
    assert reason is FinishReason.TIMEOUT, "a deadline holds whatever the engine does"
    assert await answer.whole() == expected
    assert not psutil.pid_exists(stopped)


async def test_what_an_engine_computed_that_is_late_for_a_deadline_is_told(engine: AsyncEngine) -> None:
    """Whoever asked has their answer by then; what it took is theirs to pay for."""
    told: list[int] = []
    deadline = asyncio.get_running_loop().time() + 2
    answer = Answer(engine, [5, 6, 7], LONG, deadline=deadline, computed=told.append)
    await answer.has(3)
    process = pid(engine)
    os.kill(process, signal.SIGSTOP)
    ((_, _, tokens, _, reason),) = await answer.whole()
    assert reason is FinishReason.TIMEOUT
    known = len(told)
    os.kill(process, signal.SIGCONT)
    async with asyncio.timeout(30):
        while len(told) == known:
            await asyncio.sleep(0.01)
    assert told[-1] >= 3 + len(tokens) - 1
    assert pid(engine) == process


@pytest.mark.parametrize(
    "crash", [failing_engine.KILLS, failing_engine.FAILS_PLANNING, failing_engine.FAILS_COMMIT]
)
@pytest.mark.prove
async def test_a_request_that_crashes_the_engine_ends_alone(
    crash: int, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TEST_HOOK, failing_engine.__name__)
    async with engine_of(model_path) as engine:
        prompts = [[5, 6, 7, number] for number in range(6)]
        params = msgspec.structs.replace(LONG, max_tokens=60)
        expected = [await Answer(engine, prompt, params).whole() for prompt in prompts]
        answers = [Answer(engine, prompt, params) for prompt in prompts]
        process = pid(engine)
        ((_, _, tokens, _, reason),) = await Answer(engine, [failing_engine.RAISES, 1, 2], params).whole()
        assert (tokens, reason) == ([], FinishReason.ERROR)
        assert pid(engine) == process, "what only raises harms nobody else"
        bad = Answer(engine, [crash, 1, 2], params)
        with pytest.raises(RequestCrashedError, match="makes the engine crash"):
            await bad.whole()
        assert [await answer.whole() for answer in answers] == expected
        assert engine.phase is Phase.READY


@pytest.mark.prove
async def test_a_step_that_spins_for_ever_is_seen(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another thread of the same process still beats."""
    monkeypatch.setenv(TEST_HOOK, failing_engine.__name__)
    monkeypatch.setenv(failing_engine.FAILED_ONCE, str(tmp_path / "spun"))
    async with engine_of(model_path, step_timeout=1.0) as engine:
        before = pid(engine)
        answers = [Answer(engine, [first, 6, 7], LONG) for first in (5, failing_engine.SPINS_ONCE)]
        assert [len((await answer.whole())[0][2]) for answer in answers] == [160, 160]
        assert pid(engine) != before


@pytest.mark.prove
async def test_a_message_that_is_none_costs_nobody_a_bit(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TEST_HOOK, failing_engine.__name__)
    monkeypatch.setenv(failing_engine.FAILED_ONCE, str(tmp_path / "garbled"))
    async with engine_of(model_path) as engine:
        expected = await Answer(engine, [5, 6, 7], LONG).whole()
        answer = Answer(engine, [5, 6, 7], LONG)
        await answer.has(10)
        recording = asyncio.create_task(engine.record_trace(10**6))
        await asyncio.sleep(0.05)
        garbled = Answer(engine, [failing_engine.GARBLES_ONCE, 6, 7], LONG)
        assert await answer.whole() == expected
        with pytest.raises(EngineDeadError, match="a message that is none"):
            await recording
        assert len((await garbled.whole())[0][2]) == LONG.max_tokens


@pytest.mark.prove
async def test_when_no_engine_comes_back_everybody_is_told(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.client.supervisor.MOST_FAILURES", 2)
    async with engine_of(model_path) as engine:
        answer = Answer(engine, [5, 6, 7], LONG)
        await answer.has(10)
        monkeypatch.setenv(TEST_HOOK, "no.such.module")
        os.kill(pid(engine), signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="2 engines in a row gave nobody a token"):
            await answer.whole()
        assert engine.failed.is_set()
        with pytest.raises(EngineDeadError):
            await anext(engine.generate([1], LONG))
        with pytest.raises(EngineDeadError):
            await engine.record_trace(1)
    assert engine.num_in_flight == 0


@pytest.mark.prove
async def test_an_embedding_is_progress(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crashes far apart in the life of a server that only embeds do not end it."""
    monkeypatch.setattr("scheduler.client.supervisor.MOST_FAILURES", 2)
    async with engine_of(model_path) as engine:
        for _ in range(3):
            ((_, _, _, _, reason),) = await Answer(engine, [5, 6, 7], EMBED).whole()
            assert reason is FinishReason.LENGTH
            os.kill(pid(engine), signal.SIGKILL)
            while engine.phase is Phase.READY:
                await asyncio.sleep(0.05)
            await is_ready(engine)


async def test_stopping_does_not_wait_for_an_engine_that_died_unseen(model_path: str) -> None:
    async with asyncio.timeout(60), engine_of(model_path) as engine:
        os.kill(pid(engine), signal.SIGKILL)


def test_who_is_a_suspect() -> None:
    suspects = Suspects()
    assert suspects.crashed(["a", "b", "c"]) is None
    assert suspects.next(["a", "b", "c", "d"]) is None, "once may be anybody's fault"
    suspects.cleared("b")
    assert suspects.crashed(["a", "b", "c"]) is None
    assert suspects.next(["a", "b", "c", "d"]) == "a"
    assert suspects.crashed([]) is None, "it died, but not of it"
    assert suspects.next(["a", "b", "c", "d"]) == "a"
    assert suspects.cleared("a"), "it got a token"
    assert suspects.next(["a", "b", "c", "d"]) == "c"
    assert suspects.crashed(["c"]) == "c"
    suspects.cleared("c")
    assert suspects.next(["a", "b", "d"]) is None
