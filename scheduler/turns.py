"""Where a step of everybody would take long, they take turns, so that whoever arrives waits less for the next one.

On a processor whose arithmetic is what a step waits for, two steps of half the batch take as long as one of the
whole: nobody is slower for it, and a newcomer waits for half as much.
"""

from __future__ import annotations

import math

from scheduler.request import Sequence
from scheduler.step_cost import StepCost


class Turns:
    """Keeps steps near `seconds`, as far as `cost` can tell."""

    def __init__(self, cost: StepCost, seconds: float) -> None:
        self._cost = cost
        self._seconds = seconds
        self._num_turns = 0
        self._last: dict[tuple[str, int], int] = {}  # the number of each decoding sequence's last turn

    def divide(self, decoding: list[Sequence], num_wanted: int, budget: int) -> tuple[list[Sequence], int]:
        """Those whose turn it is, and the tokens of their step: all and the whole budget if a step of `num_wanted`
        tokens is short enough, else those who waited longest, and the same part of the budget."""
        attended = sum(sequence.num_tokens for sequence in decoding)
        seconds = self._cost.predict(min(num_wanted, budget), attended)
        parts = max(1, round(seconds / self._seconds))
        if parts == 1 or not decoding:
            self._last.clear()
            return decoding, budget
        last = {sequence.key: self._last.get(sequence.key, 0) for sequence in decoding}
        size = math.ceil(len(decoding) / parts)
        chosen = sorted(decoding, key=lambda sequence: last[sequence.key])[:size]
        for sequence in chosen:
            self._num_turns += 1
            last[sequence.key] = self._num_turns
        self._last = last
        return chosen, max(math.ceil(budget / parts), size + 1)
