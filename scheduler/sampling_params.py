"""How an answer is chosen, token by token, and when it stops: what a client may ask for."""

from __future__ import annotations

from typing import Literal

import msgspec

from scheduler.grammar_spec import GrammarSpec


class InvalidRequestError(ValueError):
    """The request cannot be served as it is; the message tells the client what to change.

    `param` names the field at fault, and `code` the kind of fault, where they have names.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


TOO_LONG = "context_length_exceeded"
"""The code of a request that is longer than the model's context: programs cut their prompts when they read it."""


class PromptTooLongError(InvalidRequestError):
    """The prompt has `num_tokens` (or more: a text is not counted to its end), `longest` with the answer fit."""

    def __init__(self, message: str, num_tokens: int, longest: int) -> None:
        super().__init__(message, "prompt", TOO_LONG)
        self.num_tokens = num_tokens
        self.longest = longest


MAX_ITEMS = 1024
"""Of a list of tokens, or of biases, in one request."""

MAX_LOGPROBS = 1000
"""Of the alternatives to each token."""

MAX_REPETITION_PENALTY = 100.0
"""And its inverse is the least: logits stay numbers whose differences float32 can tell, also over the lowest
temperature."""

MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a model's generation config may say, where a request does not."""

SORTED_FROM = 0.9
"""The temperature from which on top_p leaves so many candidates that most of the vocabulary is sorted for it."""

GREEDY_BELOW = 1e-5
"""Logits over a temperature below this have nothing left to draw from."""


Pooling = Literal["mean", "last"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens, and when to stop. Raises `InvalidRequestError` for values out of range."""

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

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, expected: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{param} must be {expected}, got {getattr(self, param)}", param)

        check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "at least 0")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(self.top_k >= 0, "top_k", "at least 0")
        check(0.0 <= self.top_p <= 1.0, "top_p", "between 0 and 1")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check(all(self.stop), "stop", "made of non-empty strings")
        for param in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, param)
            check(wanted is None or 0 <= wanted <= MAX_LOGPROBS, param, f"between 0 and {MAX_LOGPROBS}")
        check(1 <= self.n <= 128, "n", "between 1 and 128")
        for param in ("presence_penalty", "frequency_penalty"):
            check(-2.0 <= getattr(self, param) <= 2.0, param, "between -2 and 2")
        check(
            1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "repetition_penalty",
            f"between {1 / MAX_REPETITION_PENALTY:g} and {MAX_REPETITION_PENALTY:g}",
        )
        check(all(self.bad_words), "bad_words", "made of non-empty strings")
        for param in ("stop_token_ids", "logit_bias", "bad_words", "allowed_token_ids"):
            if len(getattr(self, param)) > MAX_ITEMS:
                raise InvalidRequestError(f"{param} can be {MAX_ITEMS} at most", param)
        if not all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()):
            raise InvalidRequestError("the values of logit_bias must be between -100 and 100", "logit_bias")
        if self.pooling is not None and (self.max_tokens != 0 or self.n != 1):
            raise InvalidRequestError("an embedding is of the prompt alone: max_tokens 0, n 1", "pooling")
        if self.grammar is not None and self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids may leave nothing of a grammar", "allowed_token_ids")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def token_cost(self) -> float:
        """How many plain tokens one of its answer's counts for: to choose it may take longer than to compute it.
        As measured with eight at once (`python -m benchmarks.choosing`)."""
        is_sorted = self.top_p < 1 and self.top_k == 0 and self.temperature >= SORTED_FROM
        if self.explain:
            return 5.0 if is_sorted else 1.5
        return 2.0 if is_sorted else 1.0

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
