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

    def take(self, decoding: list[Sequence]) -> list[Sequence]:
        """Those whose turn it is: all, if a step of all is short enough, else those who waited longest."""
        attended = sum(sequence.num_tokens for sequence in decoding)
        size = math.ceil(len(decoding) / self._parts(len(decoding), attended))
        if size == len(decoding):
            self._last.clear()
            return decoding
        last = {sequence.key: self._last.get(sequence.key, 0) for sequence in decoding}
        chosen = sorted(decoding, key=lambda sequence: last[sequence.key])[:size]
        for sequence in chosen:
            self._num_turns += 1
            last[sequence.key] = self._num_turns
        self._last = last
        return chosen

    def budget(self, budget: int, num_decoding: int) -> int:
        """Tokens of a step in which so many sequences decode."""
        if num_decoding == 0:
            return budget
        return min(budget, max(math.ceil(budget / self._parts(budget, 0)), num_decoding + 1))

    def _parts(self, num_tokens: int, attended: int) -> int:
        return max(1, round(self._cost.predict(num_tokens, attended) / self._seconds))
