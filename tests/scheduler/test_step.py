"""A step is plain data: it can be sent elsewhere, and it can hold guesses."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.core.step import ChunkInput, SeatChanges, StepInput, StepResult, TableChange
from scheduler.execution.runner import Launched, Runner
from scheduler.models.loading import load
from scheduler.process.engine_core import EngineCore
from scheduler.process.parts import runner_of
from scheduler.sampling_params import SamplingParams

KNOBS = {"dtype": "float32", "kv_cache_memory": "4MB", "max_num_seqs": 4, "max_batched_tokens": 16}

ELSEWHERE = """
import sys, msgspec
from scheduler.config import EngineConfig
from scheduler.process.parts import runner_of
from scheduler.models.loading import load
from scheduler.core.step import StepInput

path, knobs = sys.argv[1], msgspec.json.decode(sys.argv[2])
runner = runner_of(load(EngineConfig(**knobs), path), knobs["max_num_seqs"])
steps = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=list[StepInput])
results = [runner.collect(runner.launch(step)) for step in steps]
sys.stdout.buffer.write(msgspec.msgpack.encode(results))
"""


def test_steps_that_are_sent_to_another_process_give_the_same_there(
    tiny_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = EngineCore(EngineConfig(**KNOBS), tiny_path)
    steps: list[StepInput] = []
    results: list[StepResult] = []
    launch, collect = core.executor.launch, core.executor.collect

    def launching(step: StepInput) -> Launched:
        steps.append(step)
        return launch(step)

    def collecting(handle: Launched) -> StepResult:
        results.append(collect(handle))
        return results[-1]

    monkeypatch.setattr(core.executor, "launch", launching)
    monkeypatch.setattr(core.executor, "collect", collecting)
    for number in range(7):
        params = SamplingParams(max_tokens=12, seed=number, temperature=0.5 * number, logprobs=2)
        core.add(Request(request_id=str(number), prompt_token_ids=list(range(3, 12 + number)), params=params))
    while core.has_work:
        core.step()
    assert len(steps) > 20
    there = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, tiny_path, msgspec.json.encode(KNOBS).decode()],
        input=msgspec.msgpack.encode(steps),
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    ).stdout
    assert msgspec.msgpack.decode(there, type=list[StepResult]) == results


def sampled(runner: Runner, chunk: ChunkInput) -> list[int]:
    changes = SeatChanges([TableChange(0, 0, [0, 1, 2, 3])])
    (result,) = runner.collect(runner.launch(StepInput([chunk], changes)))
    return result.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessed_tokens_are_kept_as_far_as_they_are_right(tiny_path: str, temperature: float) -> None:
    runner = runner_of(load(EngineConfig(**KNOBS), tiny_path), 4)
    params = SamplingParams(max_tokens=20, seed=3, temperature=temperature)
    prompt = list(range(5, 17))
    tokens = list(prompt)
    for _ in range(5):
        tokens += sampled(runner, ChunkInput("r", 0, 0, 0, list(tokens), 0, True, params))
    right = tokens[len(prompt) :]
    first_wrong, third_wrong = (right[0] + 1) % 100, (right[2] + 1) % 100
    for drafted, kept in [
        (right[:4], 5),
        ([*right[:2], third_wrong, right[3]], 3),
        ([first_wrong, *right[1:4]], 1),
        ([], 1),
    ]:
        chunk = ChunkInput("r", 0, 0, 0, [*prompt, *drafted], len(drafted), True, params)
        assert sampled(runner, chunk) == right[:kept]
