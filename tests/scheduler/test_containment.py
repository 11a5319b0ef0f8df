"""What one request makes fail, wherever in the engine, ends it alone: the others' tokens are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from scheduler.config import EngineConfig
from scheduler.core.drawing import SamplingRow
from scheduler.core.request import FinishReason, Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.step import StepInput
from scheduler.execution import sampler
from scheduler.execution.runner import Runner
from scheduler.execution.steering import Steerings
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.wire.messages import SequenceOutput

BAD = "bad"
BAD_SEED = 666


def fails_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Scheduler.add

    def failing(scheduler: Scheduler, request: Request, progress: Any = None) -> Any:
        if request.request_id == BAD:
            raise ZeroDivisionError
        return add(scheduler, request, progress)

    monkeypatch.setattr(Scheduler, "add", failing)


def fails_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Runner.launch

    def failing(runner: Runner, step: StepInput) -> Any:
        if any(chunk.request_id == BAD for chunk in step.chunks):
            raise RuntimeError("out of memory")
        return launch(runner, step)

    monkeypatch.setattr(Runner, "launch", failing)


def fails_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sampler.sample

    def failing(logits: torch.Tensor, rows: list[SamplingRow], *more: Any) -> Any:
        if any(row.params.seed == BAD_SEED for row in rows):
            raise ZeroDivisionError
        return sample(logits, rows, *more)

    monkeypatch.setattr("scheduler.execution.runner.sample", failing)


def fails_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its answer."""
    launch = Runner.launch

    def failing(runner: Runner, step: StepInput) -> Any:
        if any(chunk.request_id == BAD and chunk.start > 15 for chunk in step.chunks):
            raise ZeroDivisionError
        return launch(runner, step)

    monkeypatch.setattr(Runner, "launch", failing)


def fails_steering(monkeypatch: pytest.MonkeyPatch) -> None:
    steer = Steerings.steer

    def failing(steerings: Steerings, chunks: Any) -> Any:
        if any(chunk.request_id == BAD for chunk in chunks):
            raise ZeroDivisionError
        return steer(steerings, chunks)

    monkeypatch.setattr(Steerings, "steer", failing)


@pytest.mark.parametrize("stage", [fails_admission, fails_forward, fails_sampling, fails_late, fails_steering])
def test_one_fails_and_31_do_not(
    stage: Callable[[pytest.MonkeyPatch], None],
    tiny_path: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(with_bad: bool) -> dict[str, list[SequenceOutput]]:
        core = EngineCore(EngineConfig(dtype="float32", max_num_seqs=32, kv_cache_memory="8MB"), tiny_path)
        outputs: list[SequenceOutput] = []
        for number in range(31):
            params = SamplingParams(max_tokens=12, seed=number, ignore_eos=True)
            if number % 3 == 0:
                params = msgspec.structs.replace(params, frequency_penalty=0.5)
            prompt = [3 + (7 * place + number) % 150 for place in range(5 + number)]
            core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
            if number == 12 and with_bad:
                params = msgspec.structs.replace(params, seed=BAD_SEED, presence_penalty=0.2)
                outputs += core.add(Request(request_id=BAD, prompt_token_ids=prompt, params=params))
        while core.has_work:
            outputs += core.step().outputs
        assert core.pool.num_used == 0
        found: dict[str, list[SequenceOutput]] = {}
        for output in outputs:
            found.setdefault(output.request_id, []).append(output)
        return found

    def tokens(outputs: dict[str, list[SequenceOutput]]) -> dict[str, list[int]]:
        return {name: [token for output in own for token in output.token_ids] for name, own in outputs.items()}

    expected = tokens(run(with_bad=False))
    stage(monkeypatch)
    with caplog.at_level(logging.ERROR):
        found = run(with_bad=True)
    (end,) = (output for output in found.pop(BAD) if output.finish_reason is not None)
    assert end.finish_reason is FinishReason.ERROR
    assert end.error is not None
    assert "its log says why" in end.error
    assert "Traceback" in caplog.text
    assert tokens(found) == expected


def run_requests(core: EngineCore) -> dict[str, Any]:
    """Tokens with logprobs, logprobs of the prompt and embeddings of some requests that are computed together."""
    core.pool.reset()
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    wishes = [
        msgspec.structs.replace(plain, seed=1),
        msgspec.structs.replace(plain, seed=2, prompt_logprobs=1),
        msgspec.structs.replace(plain, seed=3, frequency_penalty=0.5, logprobs=1),
        SamplingParams(pooling="mean", max_tokens=0),
    ]
    for number, wish in enumerate(wishes):
        prompt = [3 + (7 * place + number) % 150 for place in range(50 + number)]
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=wish))
    outputs: list[SequenceOutput] = []
    while core.has_work:
        outputs += core.step().outputs
    assert core.pool.num_used == 0
    assert not [output.error for output in outputs if output.error]
    return {
        name: (
            [token for output in outputs if output.request_id == name for token in output.result.tokens],
            [each for output in outputs if output.request_id == name for each in output.result.scored],
            [
                sum(dimension)
                for dimension in zip(
                    *[o.result.pooled for o in outputs if o.request_id == name and o.result.pooled], strict=True
                )
            ],
        )
        for name in map(str, range(len(wishes)))
    }


def test_what_needs_too_much_memory_is_computed_in_smaller_steps(
    tiny_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody's answer is another one, and the steps that follow stay small."""
    config = EngineConfig(dtype="float32", max_num_seqs=8, kv_cache_memory="8MB")
    expected = run_requests(EngineCore(config, tiny_path))
    launch = Runner.launch
    sizes = []

    def failing(runner: Runner, step: StepInput) -> Any:
        sizes.append(sum(len(chunk.token_ids) for chunk in step.chunks))
        if sizes[-1] > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return launch(runner, step)

    monkeypatch.setattr(Runner, "launch", failing)
    core = EngineCore(config, tiny_path)
    assert run_requests(core) == expected
    assert "from now on a step has at most" in caplog.text
    run_requests(core)  # now it has learned how much is too much
    tried = len(sizes)
    assert run_requests(core) == expected
    assert max(sizes[tried:]) <= 20


def test_a_device_that_is_lost_ends_the_engine(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing works on it any more in this process; the next engine goes on with the requests."""

    def failing(runner: Runner, step: StepInput) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    core = EngineCore(EngineConfig(dtype="float32", kv_cache_memory="8MB"), tiny_path)
    core.add(Request(request_id="a", prompt_token_ids=[5, 6, 7], params=SamplingParams(max_tokens=4)))
    monkeypatch.setattr(Runner, "launch", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        core.step()
    assert core.scheduler.live_requests
