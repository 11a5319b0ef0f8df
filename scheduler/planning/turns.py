"""Where a step of everybody would take long, it is divided, so that whoever arrives waits less for the next one.

On a processor whose arithmetic is what a step waits for, two steps of half the work take as long as one of all of
it: nobody is slower for it, and a newcomer waits for half as much. Prompts are computed in smaller chunks first;
only where the running sequences alone fill their part of a step do they decode in turns.

Those who only get what others leave (the class `low`) are held back further: whoever comes should find a short
step under way, and whoever is there a step that is mostly theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scheduler.planning.plan import MIN_PROMPT_TOKENS, Pace
from scheduler.planning.step_cost import StepCost
from scheduler.request import Sequence

PROMPT_SHARE = 0.8
"""What prompts may take of a divided step's time, where they want so much: whoever waits for a first token waits
for all of a prompt, whoever decodes for one token."""


FEW = 0.5
"""Sequences whose tokens together take less than this share of it all decode nevertheless."""

LONGEST = 1.5
"""Times its target that a step may take before it is divided, or cut as it is put together."""

LEFTOVER_SHARE = 0.2
"""Of its target, what a step may give to those who get what others leave, while others are there."""

ALONE_SHARE = 0.6
"""Of its target, what a step of theirs takes while nobody else is there: who comes waits for half of it."""


class _Rotation:
    """Who was served last waits longest."""

    def __init__(self) -> None:
        self._num_turns = 0
        self._last: dict[tuple[str, int], int] = {}  # the number of each decoding sequence's last turn

    def next(self, decoding: list[Sequence], size: int) -> list[Sequence]:
        """The `size` of them that waited longest."""
        last = {sequence.key: self._last.get(sequence.key, 0) for sequence in decoding}
        chosen = sorted(decoding, key=lambda sequence: last[sequence.key])[:size]
        for sequence in chosen:
            self._num_turns += 1
            last[sequence.key] = self._num_turns
        self._last = last
        return chosen

    def forget(self) -> None:
        self._last.clear()


class Turns:
    """Keeps steps near `seconds`, as far as `cost` can tell."""

    def __init__(self, cost: StepCost, seconds: float) -> None:
        self._cost = cost
        self._seconds = seconds
        self.pace = Pace(cost, LONGEST * seconds)
        """The bound on a step as it is put together: who is seated in it may find a long prefix in the cache, and
        then few tokens look at many keys."""
        self._all = _Rotation()
        self._leftovers = _Rotation()

    def hold_back(
        self, decoding: list[Sequence], others: list[Sequence], gets_leftovers: Callable[[Sequence], bool]
    ) -> tuple[list[Sequence], int]:
        """Who may decode in the next step, once those are held back who get what others leave, and how many tokens
        it may compute of their prompts. The `others` have prompts to compute."""
        leftovers = [sequence for sequence in decoding if gets_leftovers(sequence)]
        num_prompts = sum(map(gets_leftovers, others))
        if len(leftovers) + num_prompts == len(decoding) + len(others):
            seconds = ALONE_SHARE * self._seconds
        else:
            seconds = self._cost.predict(0, 0) + LEFTOVER_SHARE * self._seconds
        context = sum(sequence.num_tokens for sequence in leftovers) // max(1, len(leftovers))
        room = max(1, self._cost.tokens_within(seconds, context))
        if len(leftovers) > room:
            num_turns = math.ceil(len(leftovers) / room)
            chosen = self._leftovers.next(leftovers, math.ceil(len(leftovers) / num_turns))
            keys = {sequence.key for sequence in chosen}
            decoding = [each for each in decoding if each.key in keys or not gets_leftovers(each)]
            leftovers = chosen
        return decoding, max(MIN_PROMPT_TOKENS, room - len(leftovers))

    def divide(
        self, decoding: list[Sequence], num_prompt_tokens: int, attended: int, budget: int
    ) -> tuple[list[Sequence], int]:
        """Who decodes in a step of `budget` tokens, and how many tokens it computes: all of both, if it is short
        enough. Prompts want `num_prompt_tokens` of it, whose queries look at `attended` keys."""
        keys = sum(sequence.num_tokens for sequence in decoding)
        wanted = min(num_prompt_tokens, budget - len(decoding))
        decode_seconds = self._cost.predict(len(decoding), keys)
        prompt_seconds = self._cost.predict(len(decoding) + wanted, keys + attended) - decode_seconds
        if not decoding or decode_seconds + prompt_seconds < LONGEST * self._seconds:
            self._all.forget()
            return decoding, budget
        left = self._seconds - min(prompt_seconds, PROMPT_SHARE * self._seconds)
        parts = 1 if decode_seconds < FEW * self._seconds else max(1, round(decode_seconds / left))
        chosen = self._all.next(decoding, math.ceil(len(decoding) / parts))
        left = self._seconds - decode_seconds * len(chosen) / len(decoding)
        room = math.floor(wanted * left / prompt_seconds) if prompt_seconds > 0 else 0
        return chosen, min(budget, len(chosen) + max(MIN_PROMPT_TOKENS, min(room, wanted)))
