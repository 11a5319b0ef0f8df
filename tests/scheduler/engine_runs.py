"""Runs requests through an EngineCore to their end, and keeps the record of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from scheduler.core.request import Request
from scheduler.core.sequence import Sequence
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.wire.messages import StepStats

ANY = 1e9
"""Milliseconds that a step may take: sequences do not take turns then, however slow the machine is."""


@dataclass
class Run:
    """Token ids of each request in order of submission, and one record for each step."""

    tokens: list[list[int]]
    steps: list[StepStats] = field(default_factory=list)

    @property
    def num_preemptions(self) -> int:
        return sum(step.num_preemptions for step in self.steps)

    @property
    def num_cached_tokens(self) -> int:
        return sum(step.num_cached_tokens for step in self.steps)


def run_all(core: EngineCore, prompts: list[list[int]], params: SamplingParams, *, name: str = "r") -> Run:
    """Submit all prompts at once and step until all are done; nothing may be left behind."""
    run = Run([[] for _ in prompts])
    for number, prompt in enumerate(prompts):
        refused = core.add(Request(request_id=f"{name}{number}", prompt_token_ids=prompt, params=params))
        assert not refused, refused
    while core.has_work:
        result = core.step()
        assert result.step is not None
        run.steps.append(result.step)
        for output in result.outputs:
            assert output.error is None, output.error
            run.tokens[int(output.request_id.removeprefix(name))] += output.token_ids
    assert core.pool.num_used == 0, "blocks leaked"
    return run


class Preempting:
    """Takes the seat from each sequence once, when it has generated `after` tokens, however much room there is."""

    def __init__(self, core: EngineCore, after: int = 8) -> None:
        self.victims: set[Sequence] = set()
        self._core = core
        self._after = after
        core.observers.append(self)

    def step(self, plan: Any, started: float, stats: StepStats, ended: object) -> None:
        scheduler = self._core.scheduler
        for sequence in list(scheduler.running.values()):
            if sequence not in self.victims and sequence.num_output_tokens >= self._after:
                scheduler.admission.preempt(sequence)
                self.victims.add(sequence)
