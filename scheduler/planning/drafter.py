"""Where guesses of the next tokens come from: the seam that speculative decoding rides on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol

from scheduler.planning.plan import Chunk, Plan
from scheduler.planning.sequence import Sequence

Reserve = Callable[[Sequence, int], bool]
"""Makes room for so many guessed tokens of a sequence, if there is any to spare."""


class Drafter(Protocol):
    """Told of each plan before it is executed, and of what came of it."""

    most_tokens: ClassVar[int]
    """That a step can give a sequence."""

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float = math.inf) -> None:
        """Put guesses behind the chunks of a plan: `num_tokens` at most, and only as far as the step, by what is
        known of its cost, takes no more than `longest` seconds."""

    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None:
        """A chunk that samples gave so many tokens: one, and the guesses before it that were right; in a step that
        took so many times longer for all guesses in it. Its grammar forces some tokens behind them, perhaps."""

    def forget(self, sequence: Sequence) -> None:
        """It ends; its blocks are still its own."""


class NoDrafts:
    """Each step gives each sequence one token."""

    most_tokens: ClassVar[int] = 1

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float = math.inf) -> None: ...

    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None: ...

    def forget(self, sequence: Sequence) -> None: ...
