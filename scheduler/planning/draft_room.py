"""How much may be guessed in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.planning.plan import Plan
from scheduler.request import Sequence

SLOWDOWN = 1.05
"""Times what a sequence gains, that a step may take longer for the others' guesses."""

Reserve = Callable[[Sequence, int], bool]
"""Makes room for so many guessed tokens of a sequence, if there is any to spare."""


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
    gains: list[float]
    """Tokens a step that each chunk's sequence gets lately."""

    def patience(self, expected: list[float]) -> float:
        """How many times longer the step may take, if each chunk gets so many tokens from it: everybody waits for
        it, also who gains least."""
        return SLOWDOWN * min(max(pair) for pair in zip(self.gains, expected, strict=True))
