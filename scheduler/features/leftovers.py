"""What users of the class `low` get: what the others leave, and together a small part of the engine's time.

While nobody else has work, all of it is theirs, in steps so short that whoever comes waits little. While others
have work, `LOW_SHARE` of the time that steps take is put on an account; low users' tokens are paid from it, at
what they make a step longer by the model of a step's cost. So the share holds on slow machines and fast ones, for
one low user and for a hundred, and whether a step's length is bounded by turns or by a latency target.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.core.sequence import Sequence
from scheduler.features.latency_target import MIN_PROMPT_TOKENS
from scheduler.features.rotation import Rotation
from scheduler.features.step_cost import StepCost

LOW_SHARE = 0.04
"""Of the engine's time, what all low users get together while others have work. Below the tenth that is promised,
since an estimate pays it."""

BESIDE_SHARE = 0.2
"""Of a step's target, what low users' tokens may take of one step while others are there."""

ALONE_SHARE = 0.6
"""Of its target, what a step of theirs takes while nobody else is there: who comes waits for half of it."""

UNBOUNDED = 1 << 30
"""More tokens than any step has."""


class Leftovers:
    """The account of low users' time, in seconds by the model of a step's cost. `seconds`: what a step should take
    at most; None: any time."""

    def __init__(self, cost: StepCost, seconds: float | None = None) -> None:
        self._cost = cost
        self._seconds = seconds
        self._credit = 0.0
        self._turns = Rotation()

    def hold_back(
        self, decoding: list[Sequence], gets_leftovers: Callable[[Sequence], bool], *, beside: bool
    ) -> tuple[list[Sequence], int]:
        """Who of `decoding` may decode in the next step, and how many tokens it may compute of low users' prompts.
        `beside`: whether others have work."""
        leftovers = [sequence for sequence in decoding if gets_leftovers(sequence)]
        context = sum(sequence.num_tokens for sequence in leftovers) // max(1, len(leftovers))
        room = self._room_beside(context) if beside else self._room_alone(context)
        if len(leftovers) <= room:
            return decoding, room - len(leftovers)
        # Evenly: 9 who share a room of 8 take turns by 5 and 4.
        size = -(-len(leftovers) // -(-len(leftovers) // room)) if room else 0
        chosen = set(self._turns.next(leftovers, size))
        decoding = [each for each in decoding if each in chosen or not gets_leftovers(each)]
        return decoding, 0 if beside else MIN_PROMPT_TOKENS

    def _room_beside(self, context: int) -> int:
        seconds = self._credit
        if self._seconds is not None:
            seconds = min(seconds, BESIDE_SHARE * self._seconds)
        return self._cost.tokens_within(self._cost.predict(0, 0) + seconds, context) if seconds > 0 else 0

    def _room_alone(self, context: int) -> int:
        if self._seconds is None:
            return UNBOUNDED
        return max(MIN_PROMPT_TOKENS, self._cost.tokens_within(ALONE_SHARE * self._seconds, context))

    def affords(self, num_tokens: float) -> bool:
        """Whether so many tokens, computed at once, are paid for."""
        return self._credit >= self._seconds_of(num_tokens)

    def settle(self, every: tuple[int, int], low: tuple[int, int], seats: float, most: float) -> None:
        """Others had work while a step was computed. `every`, `low`: how many tokens it had, of all and of low
        users, and at how many keys they looked. `seats`: the part of the seats that low users held while others
        waited for one. No more is saved up than what `most` tokens take."""
        seconds = self._cost.predict(*every)
        num_others = every[0] - low[0]
        without = self._cost.predict(num_others, every[1] - low[1]) if num_others else 0.0
        self._credit += LOW_SHARE * seconds - max(seconds - without, seats * seconds)
        self._credit = min(self._credit, self._seconds_of(most))

    def _seconds_of(self, num_tokens: float) -> float:
        return self._cost.predict(num_tokens, 0) - self._cost.predict(0, 0)
