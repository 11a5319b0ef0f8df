"""A bound in seconds on each step, by what steps cost."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core.plan import Plan
from scheduler.core.seams import StepBudget
from scheduler.core.sequence import Sequence
from scheduler.features.express import Express
from scheduler.features.sharing_policy import SharingPolicy
from scheduler.features.step_cost import StepCost

MIN_PROMPT_TOKENS = 16
"""What a step computes of prompts at least, whatever the latency target: they must not starve."""

DEEP = 2048
"""Keys before a chunk, from which on half of that is the least: each of its tokens takes several times as long."""


@dataclass(frozen=True, slots=True)
class CostPace:
    """No step longer than `seconds`, as far as `cost` can tell."""

    cost: StepCost
    seconds: float

    def room(self, num_tokens: int, attended: int, start: int) -> int:
        return self.cost.prompt_tokens_within(self.seconds, num_tokens, attended, start)

    def least(self, start: int) -> int:
        return MIN_PROMPT_TOKENS if start < DEEP else MIN_PROMPT_TOKENS // 2


class LatencyTarget:
    """A promise to the running streams: no step longer than `seconds`, but for the least that prompts get."""

    def __init__(self, cost: StepCost, seconds: float, policy: SharingPolicy) -> None:
        self._policy = policy
        self._pace = CostPace(cost, seconds)
        self._express = Express(policy)

    def budget(self, decoding: list[Sequence], prompts: list[Sequence], most: int) -> StepBudget:
        served, leftovers = self._policy.hold_back(decoding)
        return StepBudget(served, most, self._pace, leftovers)

    def narrow(self, plan: Plan) -> bool:
        return self._express.narrow(plan)
