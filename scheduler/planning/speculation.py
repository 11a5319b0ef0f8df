"""Which tokens are guessed, so that a step can give a sequence several: speculative decoding.

A step computes the guessed tokens of a sequence behind its known ones, and keeps them for as long as they are what
would have been sampled (Leviathan et al., arXiv 2211.17192, where the sampled token is a function of its place):
no bit of an answer changes. A guess costs what a row more costs the step, and that is little only while the step
waits for memory. So a token is guessed where that makes the whole batch faster, as far as the model of a step's
cost and the sequence's own record can tell, and where no other sequence waits longer for it than what it gains.
"""

from __future__ import annotations

from scheduler.planning.draft_room import DraftRoom, Reserve
from scheduler.planning.model_drafts import ModelDrafts
from scheduler.planning.plan import Chunk, Plan
from scheduler.planning.text_drafts import TextDrafts
from scheduler.request import Sequence

MOST_DRAFTED = 15
"""Tokens guessed for one sequence in one step."""

FIRST_GAIN = 1.5
"""Tokens a step that a sequence is taken to get before it has shown what it gets."""

GAIN_MEMORY = 0.9
"""How much of that is left after each step."""


class Speculation:
    """Guesses from text that is there already, where there are some, and else those of a draft model."""

    def __init__(self, max_model_len: int, text: TextDrafts | None, model: ModelDrafts | None = None) -> None:
        self._max_model_len = max_model_len
        self._text = text
        self._model = model
        self._gains: dict[tuple[str, int], float] = {}
        """Tokens a step that each sequence got lately."""

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float | None = None) -> None:
        """Put guesses behind the chunks of a plan, or ask the draft model for some: `num_tokens` at most, and only
        as far as the step, by what is known of its cost, takes no more than `longest` seconds."""
        most = [min(num_tokens, self.most(chunk)) for chunk in plan.chunks]
        if not any(count > 0 for count in most):
            return
        for chunk, count in zip(plan.chunks, most, strict=True):
            if count > 0:
                self._gains.setdefault(chunk.sequence.key, FIRST_GAIN)
        gains = [self._gain(chunk) for chunk in plan.chunks]
        limit = longest if longest is not None else float("inf")
        room = DraftRoom(plan, reserve, num_tokens, limit, most, gains)
        expected = self._text.draft(room) if self._text is not None else [1.0] * len(plan.chunks)
        if self._model is not None:
            self._model.ask(room, expected)

    def learn(self, chunk: Chunk, num_kept: int, forced: list[int]) -> None:
        """A chunk that samples gave so many tokens: one, and the guesses before it that were right. Its grammar
        forces some tokens behind them, perhaps."""
        key = chunk.sequence.key
        if key in self._gains:
            self._gains[key] += (1 - GAIN_MEMORY) * (num_kept - self._gains[key])
        if chunk.drafted:
            drafts = self._model if chunk.draft_kind == "model" else self._text
            assert drafts is not None
            drafts.learn(chunk, num_kept - 1)
        if self._text is not None:
            self._text.force(chunk.sequence, forced)

    def forget(self, sequence: Sequence) -> None:
        """It ends; its blocks are still its own."""
        self._gains.pop(sequence.key, None)
        for drafts in (self._text, self._model):
            if drafts is not None:
                drafts.forget(sequence)

    def _gain(self, chunk: Chunk) -> float:
        """Tokens a step that the chunk's sequence gets lately; one that computes its prompt gets no more than one
        for what it waits."""
        return max(1.0, self._gains.get(chunk.sequence.key, 1.0)) if chunk.samples else 1.0

    def most(self, chunk: Chunk) -> int:
        """How many guesses may be behind a chunk: none but those that can become part of the answer."""
        if not chunk.samples:
            return 0
        sequence = chunk.sequence
        if sequence.window is None:
            left = self._max_model_len - sequence.num_tokens
        else:
            left = min(sequence.window.longest - sequence.num_tokens, sequence.until_shift - chunk.length + 1)
        if (max_tokens := sequence.request.params.max_tokens) is not None:
            left = min(left, max_tokens - sequence.num_output_tokens)
        return min(MOST_DRAFTED, left - 1)
