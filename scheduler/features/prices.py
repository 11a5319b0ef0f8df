"""What tokens count on a user's account, and what it costs to choose one."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core.plan import Chunk
from scheduler.core.policy import Work
from scheduler.core.sampling import Sampling

SORTED_FROM = 0.9
"""The temperature from which on top_p leaves so many candidates that most of the vocabulary is sorted for it."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token counts, in prompt tokens. Output tokens cost a step each; cached ones hardly anything."""

    output: float = 2.0
    cached: float = 0.05

    def service(self, work: Work) -> float:
        """A wrong guess costs what it takes to compute it, and a token of an answer what it takes to choose it."""
        output = self.output * work.output * token_cost(work.sequence.request.params)
        return work.prompt + self.cached * work.cached + output + work.refused


def token_cost(params: Sampling) -> float:
    """How many plain tokens one of an answer's counts for: to choose it may take longer than to compute it. As
    measured with eight at once (`python -m benchmarks.choosing`)."""
    is_sorted = params.top_p < 1 and params.top_k == 0 and params.temperature >= SORTED_FROM
    if params.explain:
        return 5.0 if is_sorted else 1.5
    return 2.0 if is_sorted else 1.0


def choosing_cost(chunk: Chunk) -> float:
    """What choosing a chunk's tokens costs beyond computing them, in tokens."""
    num_chosen = len(chunk.drafted) + 1 if chunk.samples else 0
    return num_chosen * (token_cost(chunk.sequence.request.params) - 1)
