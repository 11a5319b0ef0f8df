"""How long a step may be: the seam that bounds on latency ride on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from scheduler.planning.plan import NO_PACE, Pace, Plan
from scheduler.planning.sequence import Sequence


class Wanted(NamedTuple):
    """The tokens of a prompt that a step might compute."""

    start: int
    """Keys before the first of them."""
    length: int


class StepBudget(NamedTuple):
    """What a step may be."""

    decoding: list[Sequence]
    """Who decodes in it."""
    num_tokens: int
    """That it computes at most."""
    pace: Pace
    """How long it may be as it is put together."""


class Pacing(Protocol):
    """Asked before a plan is put together, and after."""

    def budget(self, decoding: list[Sequence], prompts: Iterable[Wanted], most: int) -> StepBudget:
        """Of a step in which these could decode, and which computes `most` tokens at most. `prompts`: what they
        want of it."""

    def narrow(self, plan: Plan) -> bool:
        """Leave only a part in a plan that is put together; whether that was done."""


class NoPacing:
    """A step is as long as it gets."""

    def budget(self, decoding: list[Sequence], prompts: Iterable[Wanted], most: int) -> StepBudget:
        return StepBudget(decoding, most, NO_PACE)

    def narrow(self, plan: Plan) -> bool:
        return False
