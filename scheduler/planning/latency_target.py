"""A bound in seconds on each step, by what steps cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.planning.express import Express
from scheduler.planning.pacing import StepBudget, Wanted
from scheduler.planning.plan import Plan
from scheduler.planning.sequence import Sequence
from scheduler.planning.sharing_policy import SharingPolicy
from scheduler.planning.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class CostPace:
    """No step longer than `seconds`, as far as `cost` can tell."""

    cost: StepCost
    seconds: float

    def room(self, num_tokens: int, attended: int, start: int) -> int:
        return self.cost.prompt_tokens_within(self.seconds, num_tokens, attended, start)


class LatencyTarget:
    """A promise to the running streams: no step longer than `seconds`, but for the least that prompts get."""

    def __init__(self, cost: StepCost, seconds: float, policy: SharingPolicy) -> None:
        self._pace = CostPace(cost, seconds)
        self._express = Express(policy)

    def budget(self, decoding: list[Sequence], prompts: Iterable[Wanted], most: int) -> StepBudget:
        return StepBudget(decoding, most, self._pace)

    def narrow(self, plan: Plan) -> bool:
        return self._express.narrow(plan)
