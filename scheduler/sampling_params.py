"""What a client may ask for of `Sampling`: the same fields, held to their ranges."""

from __future__ import annotations

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import Sampling

MAX_ITEMS = 1024
"""Of a list of tokens, or of biases, in one request."""

MAX_LOGPROBS = 1000
"""Of the alternatives to each token."""

MAX_REPETITION_PENALTY = 100.0
"""And its inverse is the least: logits stay numbers whose differences float32 can tell, also over the lowest
temperature."""

MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a model's generation config may say, where a request does not."""


class SamplingParams(Sampling, frozen=True, kw_only=True):
    """How to choose tokens, and when to stop. Raises `InvalidRequestError` for values out of range."""

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
