"""Whether a request fits an engine at all, and how long its answer can get."""

from __future__ import annotations

from scheduler.core.request import InvalidRequestError, Request
from scheduler.core.sampling import Sampling

TOO_LONG = "context_length_exceeded"
"""The code of a request that is longer than the model's context: programs cut their prompts when they read it."""


class PromptTooLongError(InvalidRequestError):
    """The prompt has `num_tokens` (or more: a text is not counted to its end), `longest` with the answer fit."""

    def __init__(self, message: str, num_tokens: int, longest: int) -> None:
        super().__init__(message, "prompt", TOO_LONG)
        self.num_tokens = num_tokens
        self.longest = longest


def longest_of(
    num_prompt_tokens: int, *, context_shift: bool, max_model_len: int, pool_tokens: int, shifted_len: int
) -> int:
    """Tokens that prompt plus answer can have. `pool_tokens` is the length of the longest sequence that all blocks
    of the pool hold, `shifted_len` that of one that goes on beyond its window."""
    longest = min(max_model_len, pool_tokens)
    return max(longest, shifted_len) if context_shift and num_prompt_tokens < longest else longest


def check_fits(
    request: Request, *, max_model_len: int, pool_tokens: int, vocab_size: int, shifted_len: int = 0
) -> None:
    """Raise `InvalidRequestError` for a request that even an empty engine could not finish. The lengths are those
    of `longest_of`."""
    num_prompt_tokens = len(request.prompt_token_ids)
    longest = longest_of(
        num_prompt_tokens,
        context_shift=bool(request.params.context_shift),
        max_model_len=max_model_len,
        pool_tokens=pool_tokens,
        shifted_len=shifted_len,
    )
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt is empty: at least one token is needed", "prompt")
    if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocab_size:
        raise InvalidRequestError(f"the prompt has token ids outside of 0 to {vocab_size - 1}", "prompt")
    max_tokens = request.params.max_tokens
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt_tokens + wanted > longest:
        asked = (
            f"This model's maximum context length is {longest} tokens. However, you requested "
            f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt, {wanted} in the answer): "
            "shorten the prompt"
        )
        if num_prompt_tokens + min(wanted, 1) > longest:
            raise PromptTooLongError(f"{asked}.", num_prompt_tokens, longest)
        raise InvalidRequestError(f"{asked} or lower max_tokens.", "max_tokens", TOO_LONG)
    _check_tokens(request.params, vocab_size)


def _check_tokens(params: Sampling, vocab_size: int) -> None:
    chosen = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": [token for phrase in params.bad_words if not isinstance(phrase, str) for token in phrase],
    }
    for param, tokens in chosen.items():
        if not all(0 <= token < vocab_size for token in tokens):
            raise InvalidRequestError(f"{param} has token ids outside of 0 to {vocab_size - 1}", param)
