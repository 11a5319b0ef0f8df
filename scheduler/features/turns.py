"""Where a step of everybody would take long, it is divided, so that whoever arrives waits less for the next one.

On a processor whose arithmetic is what a step waits for, two steps of half the work take as long as one of all of
it: nobody is slower for it, and a newcomer waits for half as much. Prompts are computed in smaller chunks first;
only where the running sequences alone fill their part of a step do they decode in turns.

Those who only get what others leave (the class `low`) are held back before that (leftovers.py).
"""

from __future__ import annotations

import math

from scheduler.core.seams import StepBudget
from scheduler.core.sequence import Sequence
from scheduler.features.latency_target import MIN_PROMPT_TOKENS, LatencyTarget
from scheduler.features.rotation import Rotation
from scheduler.features.sharing_policy import SharingPolicy
from scheduler.features.step_cost import StepCost

PROMPT_SHARE = 0.8
"""What prompts may take of a divided step's time, where they want so much: whoever waits for a first token waits
for all of a prompt, whoever decodes for one token."""


FEW = 0.5
"""Sequences whose tokens together take less than this share of it all decode nevertheless."""

LONGEST = 1.5
"""Times its target that a step may take before it is divided, or cut as it is put together."""


class Turns(LatencyTarget):
    """Keeps steps near `seconds`, as far as `cost` can tell. As a step is put together it is bounded by `LONGEST`
    times that: who is seated in it may find a long prefix in the cache, and then few tokens look at many keys."""

    def __init__(self, cost: StepCost, seconds: float, policy: SharingPolicy) -> None:
        super().__init__(cost, LONGEST * seconds, policy)
        self._cost = cost
        self._seconds = seconds
        self._all = Rotation()

    def budget(self, decoding: list[Sequence], prompts: list[Sequence], most: int) -> StepBudget:
        """All of both, if the step is short enough for it."""
        held = super().budget(decoding, prompts, most)
        decoding = held.decoding
        num_prompt_tokens, attended = self._wanted(prompts, most, held.leftovers)
        keys = sum(sequence.num_tokens for sequence in decoding)
        wanted = min(num_prompt_tokens, most - len(decoding))
        decode_seconds = self._cost.predict(len(decoding), keys)
        prompt_seconds = self._cost.predict(len(decoding) + wanted, keys + attended) - decode_seconds
        if not decoding or decode_seconds + prompt_seconds < LONGEST * self._seconds:
            self._all.forget()
            return held
        left = self._seconds - min(prompt_seconds, PROMPT_SHARE * self._seconds)
        parts = 1 if decode_seconds < FEW * self._seconds else max(1, round(decode_seconds / left))
        chosen = self._all.next(decoding, math.ceil(len(decoding) / parts))
        left = self._seconds - decode_seconds * len(chosen) / len(decoding)
        room = math.floor(wanted * left / prompt_seconds) if prompt_seconds > 0 else 0
        num_tokens = len(chosen) + max(MIN_PROMPT_TOKENS, min(room, wanted))
        return held._replace(decoding=chosen, num_tokens=min(most, num_tokens))

    def _wanted(self, prompts: list[Sequence], left: int, leftovers: int) -> tuple[int, int]:
        """How many tokens prompts want of a step, and how many keys these look at."""
        num_tokens = attended = 0
        for sequence in prompts:
            gets_leftovers = self._policy.gets_leftovers(sequence)
            start = sequence.num_computed_tokens
            length = min(sequence.num_tokens - start, left, leftovers if gets_leftovers else left)
            leftovers -= length if gets_leftovers else 0
            left -= length
            num_tokens += length
            attended += length * start + length * length // 2
            if left == 0:
                break
        return num_tokens, attended
