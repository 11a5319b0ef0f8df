"""What happened at each step of an answer, for people: what went in, what could come next, and which was taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.client.stream import Delta
from scheduler.core.step import Choice, TokenLogprobs
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import SequenceOutput, StepPart

NUM_LIKELIEST = 5
"""How many of the likeliest tokens are shown, where the request does not say it."""


class NamedToken(msgspec.Struct, frozen=True):
    id: int
    text: str


class LikelyToken(NamedToken, frozen=True):
    probability: float
    """As the model has it."""


class ChosenToken(LikelyToken, frozen=True, kw_only=True):
    likeliest: list[LikelyToken]
    how: Literal["greedy", "drawn"]
    chosen_with: float
    """Its probability when it was chosen: after penalties, masks, temperature and truncation."""
    candidates: int | UnsetType = UNSET
    """How many tokens could be drawn."""
    number: float | UnsetType = UNSET
    """The number that was drawn, between 0 and 1."""
    part: tuple[float, float] | UnsetType = UNSET
    """Where the token's part lies among the candidates' probabilities, side by side from 0 to 1: the number fell
    in here."""


class ExplainedStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the engine, as one answer sees it."""

    step: int
    """Counts from 1."""
    cached: int
    """Tokens of the context whose keys and values were in the cache."""
    dropped: int
    """Tokens that were in it once, and made room (`context_shift`)."""
    input: list[NamedToken]
    """Those after them, which the step computed."""
    drafted: list[NamedToken]
    """Guesses of what comes after the input, which the step computed too."""
    kept: int
    """How many of the guesses were right: they are the first of `tokens`."""
    tokens: list[ChosenToken]
    """What the step added to the answer; nothing, while a long prompt is computed."""
    sequences: int
    """How many answers shared the step."""
    milliseconds: float
    """That it took to compute it, and to choose the tokens of all."""


class Explainer:
    """Words the steps of one answer."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt_token_ids
        self._answer: list[int] = []
        self._num_steps = 0
        self._steps: list[ExplainedStep] = []

    def pop(self) -> list[ExplainedStep] | UnsetType:
        """The steps taken in since the last time, if there are any."""
        steps, self._steps = self._steps, []
        return steps or UNSET

    def take(self, delta: Delta) -> None:
        """Take in the step that gave a delta, if one did and is to be explained."""
        if (part := delta.output.part) is not None:
            self._num_steps += 1
            self._steps.append(self._step(delta.output, part))
            self._answer += delta.token_ids

    def _step(self, output: SequenceOutput, part: StepPart) -> ExplainedStep:
        end, num_prompt_tokens = part.start + part.length, len(self._prompt)
        of_answer = self._answer[max(0, part.start - num_prompt_tokens) : max(0, end - num_prompt_tokens)]
        return ExplainedStep(
            step=self._num_steps,
            cached=part.start - part.shift,
            dropped=part.shift,
            input=[self._named(token_id) for token_id in (*self._prompt[part.start : end], *of_answer)],
            drafted=[self._named(token_id) for token_id in output.drafted],
            kept=output.num_accepted,
            tokens=[
                self._chosen(entry, choice)
                for entry, choice in zip(output.result.logprobs, output.result.choices, strict=True)
            ],
            sequences=part.num_sequences,
            milliseconds=part.seconds * 1000,
        )

    def _named(self, token_id: int) -> NamedToken:
        return NamedToken(token_id, self._tokenizer.token_text(token_id))

    def _likely(self, token_id: int, logprob: float) -> LikelyToken:
        return LikelyToken(token_id, self._tokenizer.token_text(token_id), math.exp(logprob))

    def _chosen(self, entry: TokenLogprobs, choice: Choice) -> ChosenToken:
        token = self._likely(entry.token_id, entry.logprob)
        is_drawn = choice.number is not None
        return ChosenToken(
            token.id,
            token.text,
            token.probability,
            likeliest=[self._likely(token_id, logprob) for token_id, logprob in entry.top],
            how="drawn" if is_drawn else "greedy",
            chosen_with=choice.probability,
            candidates=choice.num_candidates if is_drawn else UNSET,
            number=UNSET if choice.number is None else choice.number,
            part=(choice.low, choice.low + choice.probability) if is_drawn else UNSET,
        )
