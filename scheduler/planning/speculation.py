"""Which tokens are guessed, so that a step can give a sequence several: speculative decoding.

A step computes the guessed tokens of a sequence behind its known ones, and keeps them for as long as they are what
would have been sampled (Leviathan et al., arXiv 2211.17192, where the sampled token is a function of its place):
no bit of an answer changes. A guess costs what a row more costs the step, and that is little only while the step
waits for memory. So a token is guessed where that makes the whole batch faster, as far as the model of a step's
cost and the sequence's own record can tell, and where no other sequence waits longer for it than what it gains.
"""

from __future__ import annotations

from scheduler.planning.draft_room import FIRST_AHEAD, DraftRoom, Reserve
from scheduler.planning.model_drafts import ModelDrafts
from scheduler.planning.plan import Chunk, Plan
from scheduler.planning.text_drafts import TextDrafts
from scheduler.request import Sequence

MOST_DRAFTED = 15
"""Tokens guessed for one sequence in one step."""

MOST_AHEAD = 8.0
"""Steps that it can be ahead: what it gained long ago is no reason to let it wait now."""


class Speculation:
    """Guesses from text that is there already, where there are some, and else those of a draft model."""

    def __init__(self, max_model_len: int, text: TextDrafts | None, model: ModelDrafts | None = None) -> None:
        self._max_model_len = max_model_len
        self._text = text
        self._model = model
        self._ahead: dict[tuple[str, int], float] = {}
        """By how many steps guesses have brought each sequence forward: the tokens that its own gave it, less what
        its steps took longer for anybody's."""

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float | None = None) -> None:
        """Put guesses behind the chunks of a plan, or ask the draft model for some: `num_tokens` at most, and only
        as far as the step, by what is known of its cost, takes no more than `longest` seconds."""
        most = [min(num_tokens, self.most(chunk)) for chunk in plan.chunks]
        if max(most, default=0) <= 0:
            return
        limit = longest if longest is not None else float("inf")
        room = DraftRoom(plan, reserve, num_tokens, limit, most, self._ahead)
        expected = self._text.draft(room) if self._text is not None else [1.0] * len(plan.chunks)
        if self._model is not None:
            self._model.ask(room, expected)
        plan.stretch = room.stretch

    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None:
        """A chunk that samples gave so many tokens: one, and the guesses before it that were right; in a step that
        took so many times longer for all guesses in it. Its grammar forces some tokens behind them, perhaps."""
        if num_kept != stretch:
            key = chunk.sequence.key
            ahead = self._ahead.get(key, FIRST_AHEAD) + num_kept - stretch
            self._ahead[key] = min(max(0.0, ahead), MOST_AHEAD)
        if chunk.drafted:
            drafts = self._model if chunk.draft_kind == "model" else self._text
            assert drafts is not None
            drafts.learn(chunk, num_kept - 1)
        if self._text is not None:
            self._text.force(chunk.sequence, forced)

    def drop_model(self) -> None:
        """There is no draft model any more: nothing is asked of it."""
        self._model = None

    def forget(self, sequence: Sequence) -> None:
        """It ends; its blocks are still its own."""
        self._ahead.pop(sequence.key, None)
        for drafts in (self._text, self._model):
            if drafts is not None:
                drafts.forget(sequence)

    def most(self, chunk: Chunk) -> int:
        """How many guesses may be behind a chunk: none but those that can become part of the answer."""
        if not chunk.samples:
            return 0
        sequence = chunk.sequence
        if sequence.window is None:
            left = self._max_model_len - sequence.num_tokens
        else:
            left = min(sequence.window.longest - sequence.num_tokens, sequence.until_shift - chunk.length + 1)
        if sequence.long_after is not None and not sequence.is_long:
            left = min(left, sequence.long_after - sequence.num_tokens + 1)
        if (max_tokens := sequence.request.params.max_tokens) is not None:
            left = min(left, max_tokens - sequence.num_output_tokens)
        return min(MOST_DRAFTED, left - 1)
