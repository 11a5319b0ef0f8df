"""How an answer is chosen, token by token, what it has to look like, and when it stops."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

GREEDY_BELOW = 1e-5
"""Logits over a temperature below this have nothing left to draw from."""

Pooling = Literal["mean", "last"]


class GrammarKind(enum.StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    """The text is a JSON schema, and so a JSON object or a boolean; the answer is JSON that it accepts."""
    JSON_OBJECT = "json_object"
    """Any JSON object. There is no text."""
    REGEX = "regex"
    """The whole answer matches this regular expression."""
    CHOICE = "choice"
    """The text is a JSON array of strings; the answer is one of them."""
    LARK = "lark"
    """A context-free grammar, in Lark's notation as llguidance reads it, or in GBNF (`root ::= ...`)."""


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """A grammar and how it is written. Equal ones are compiled once."""

    kind: GrammarKind
    text: str = ""
    strict: bool = True
    """Of a JSON schema: refuse keywords that cannot be enforced, where otherwise they are ignored."""
    after: str | int | None = None
    """What ends the reasoning that comes first, where the prompt has begun it: a text, or a control token's id."""
    whitespace: str | None = None
    """Of JSON: what may stand between its parts, as a regular expression; "" for nothing, None for enough to
    indent."""
    closed: bool = False
    """Of a JSON schema: an object that names properties, and says nothing of others, has no others."""

    @property
    def is_json(self) -> bool:
        return self.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT)


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens, and when to stop. Nothing is checked here: `SamplingParams` is what clients make."""

    max_tokens: int | None = None
    """Longest answer in tokens; None: up to the model's longest length. 0: the prompt is computed, and no more."""
    min_tokens: int = 0
    """No stop of any kind before this many tokens: what would end the answer cannot be chosen."""
    temperature: float = 1.0
    """0 takes the likeliest token (greedy); higher flattens the distribution."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities sum to this or more, and at least one."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    seed: int | None = None
    """With a seed, the same request draws the same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: frozenset[int] = frozenset()
    """The answer ends with the first of these tokens."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token (for load tests)."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many likeliest alternatives, as the model has them."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    n: int = 1
    """How many sequences to sample from the same prompt."""
    context_shift: bool | None = None
    """Go on beyond the model's window, without the oldest tokens but the first; None: as the engine does."""
    explain: bool = False
    """Report how each token was chosen, and what each step was for the answer."""
    pooling: Pooling | None = None
    """Of what an embedding of the prompt is made, in place of an answer: the last hidden states of all tokens,
    or of the last one."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer has already."""
    frequency_penalty: float = 0.0
    """The same, as many times as the answer has the token."""
    repetition_penalty: float = 1.0
    """The logit of every token of prompt and answer is divided by it, or multiplied where it is below 0 (CTRL,
    Keskar et al., arXiv 1909.05858)."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these tokens."""
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or sequences of tokens, that the answer does not have."""
    allowed_token_ids: frozenset[int] = frozenset()
    """If there are any, no other token can be chosen."""

    grammar: GrammarSpec | None = None
    """What the answer's text has to look like."""
    has_processors: bool = False
    """Functions in Python change its logits too (`LLM` only)."""

    include_stop_str_in_output: bool = False
    """The stop string that ended the answer is part of its text."""
    skip_special_tokens: bool = True
    """Special tokens are not part of the text."""
    spaces_between_special_tokens: bool = True
    """With special tokens in the text, and a tokenizer that parts words by spaces."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_penalized(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_steered(self) -> bool:
        """Whether anything is done to the model's logits before a token is chosen."""
        return bool(
            self.is_penalized
            or self.logit_bias
            or self.bad_words
            or self.allowed_token_ids
            or self.min_tokens
            or self.grammar is not None
            or self.has_processors
        )
