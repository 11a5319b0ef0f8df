"""The body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from scheduler.core.request import InvalidRequestError
from scheduler.sampling_params import SamplingParams
from server.api.fields import TEXT, TEXT_OR_LIST, Length, TokenIds, described
from server.api.requests import GenerationRequest

MAX_SEQUENCES = 2048
"""Prompts times `n` in one request."""
PROMPTS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _one_in_list(prompt: Any) -> Any:
    """A single prompt, text or tokens, becomes a list of one."""
    single = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    return [prompt] if single else prompt


Prompts = Annotated[
    Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)],
    BeforeValidator(_one_in_list),
    described(PROMPTS),
]


class CompletionRequest(GenerationRequest):
    prompt: Annotated[Prompts, TEXT_OR_LIST]
    """One item for each prompt: its text or its tokens."""
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    """So many are sampled, and the `n` whose tokens are likeliest on average are the answer."""
    echo: bool = False
    """The answer begins with the prompt."""
    logprobs: Length | None = None
    """With the log-probability of each token, and of so many likeliest ones in its place; -1 is as many as the
    server allows (`--max-logprobs`)."""
    max_tokens: Length = 16
    """Tokens that the answer may have; -1 is as many as there is room for, 0 computes the prompt alone."""
    suffix: Annotated[str, TEXT] = ""
    """What comes after the answer, for models that fill in the middle."""

    def sampling_params(self, defaults: Mapping[str, float], max_logprobs: int) -> SamplingParams:
        """Raises `InvalidRequestError` for what the fields, each right by itself, do not make together."""
        if not self.prompt:
            raise InvalidRequestError("prompt is empty", "prompt")
        best_of = self.n if self.best_of is None else self.best_of
        if best_of < self.n:
            raise InvalidRequestError(f"best_of ({best_of}) must not be less than n ({self.n})", "best_of")
        if best_of > self.n and self.stream:
            raise InvalidRequestError("best_of cannot be streamed: the best are known at the end", "best_of")
        if len(self.prompt) * best_of > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts times n = {best_of} is more than {MAX_SEQUENCES}", "prompt"
            )
        if self.suffix and self.echo:
            raise InvalidRequestError("echo is not possible with a suffix", "echo")
        is_chosen = best_of > self.n and not self.use_beam_search  # by its logprobs
        return self._sampling_params(
            defaults,
            max_logprobs,
            max_tokens=self.max_tokens,
            n=best_of,
            logprobs=0 if self.logprobs is None and is_chosen else self.logprobs,
            prompt_logprobs=self.logprobs if self.echo and self.prompt_logprobs is None else None,
        )
