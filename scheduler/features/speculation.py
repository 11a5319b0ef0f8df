"""Which tokens are guessed, so that a step can give a sequence several: speculative decoding.

A step computes the guessed tokens of a sequence behind its known ones, and keeps them for as long as they are what
would have been sampled (Leviathan et al., arXiv 2211.17192, where the sampled token is a function of its place):
no bit of an answer changes. A guess costs what a row more costs the step, and that is little only while the step
waits for memory. So a token is guessed where that makes the whole batch faster, as far as the model of a step's
cost and the sequence's own record can tell, and where no other sequence waits longer for it than what it gains.
"""

from __future__ import annotations

import math
from typing import ClassVar

from scheduler.core.plan import Chunk, Plan
from scheduler.core.seams import Reserve
from scheduler.core.sequence import Sequence
from scheduler.features.draft_room import FIRST_AHEAD, DraftRoom
from scheduler.features.text_drafts import TextDrafts

MOST_DRAFTED = 15
"""Tokens guessed for one sequence in one step."""

MOST_AHEAD = 8.0
"""Steps that it can be ahead: what it gained long ago is no reason to let it wait now."""


class Speculation:
    """Guesses from text that is there already."""

    most_tokens: ClassVar[int] = MOST_DRAFTED + 1

    def __init__(self, text: TextDrafts) -> None:
        self._text = text
        self._ahead: dict[tuple[str, int], float] = {}
        """By how many steps guesses have brought each sequence forward: the tokens that its own gave it, less what
        its steps took longer for anybody's."""

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float = math.inf) -> None:
        most = [min(num_tokens, self.most(chunk)) for chunk in plan.chunks]
        if max(most, default=0) <= 0:
            return
        room = DraftRoom(plan, reserve, num_tokens, longest, most, self._ahead)
        self._text.draft(room)
        plan.stretch = room.stretch

    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None:
        if num_kept != stretch:
            key = chunk.sequence.key
            ahead = self._ahead.get(key, FIRST_AHEAD) + num_kept - stretch
            self._ahead[key] = min(max(0.0, ahead), MOST_AHEAD)
        if chunk.drafted:
            self._text.learn(chunk, num_kept - 1)
        self._text.force(chunk.sequence, forced)

    def forget(self, sequence: Sequence) -> None:
        self._ahead.pop(sequence.key, None)
        self._text.forget(sequence)

    def most(self, chunk: Chunk) -> int:
        """How many guesses may be behind a chunk: none but those that can become part of the answer."""
        if not chunk.samples:
            return 0
        sequence = chunk.sequence
        left = min(sequence.window.longest - sequence.num_tokens, sequence.until_border - chunk.length + 1)
        if not sequence.is_long:
            left = min(left, sequence.long_after - sequence.num_tokens + 1)
        if (max_tokens := sequence.request.params.max_tokens) is not None:
            left = min(left, max_tokens - sequence.num_output_tokens)
        return min(MOST_DRAFTED, left - 1)
