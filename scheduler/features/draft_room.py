"""How much may be guessed in one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.core.plan import Plan
from scheduler.core.seams import Reserve

SLOWDOWN = 1.05
"""Times what a sequence has gained, that a step may take longer for the others' guesses."""

FIRST_AHEAD = 1.0
"""Steps that a sequence is taken to be ahead before it has shown what it gains."""


@dataclass(slots=True)
class DraftRoom:
    """What a plan can take of guesses."""

    plan: Plan
    reserve: Reserve
    num_tokens: int
    """That can be guessed, for all sequences together."""
    longest: float
    """Seconds that the step may take."""
    most: list[int]
    """Guesses at most behind each of the plan's chunks."""
    ahead: Mapping[tuple[str, int], float]
    """How many steps a sequence is ahead of where it would be if nobody had guesses, as far as it has shown."""
    stretch: float = 1.0
    """How many times longer the step takes with the guesses that are in it."""

    def patience(self, expected: list[float]) -> float:
        """How many times longer the step may take, if each chunk gets so many tokens from it: everybody waits for
        it, also who is least ahead."""
        return SLOWDOWN * min(
            self.ahead.get(chunk.sequence.key, FIRST_AHEAD if chunk.samples else 0.0) + tokens
            for chunk, tokens in zip(self.plan.chunks, expected, strict=True)
        )
