"""The body of POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import Pooling
from scheduler.sampling_params import SamplingParams
from server.api.completion_request import MAX_SEQUENCES, Prompts
from server.api.fields import TEXT_OR_LIST, Count
from server.api.requests import ServedRequest


class EmbeddingRequest(ServedRequest):
    input: Annotated[Prompts, TEXT_OR_LIST]
    """One item for each embedding: its text or its tokens."""
    encoding_format: Literal["float", "base64"] = "float"
    """Base64 is of the bytes of little-endian float32 numbers."""
    dimensions: Count | None = None
    """Only as many as the model has."""

    # Beyond OpenAI's API.
    pooling: Pooling | None = None
    """The mean of all tokens' last hidden states, or the last token's; by default as the model's folder says, else
    the mean."""
    normalize: bool = True
    """Give embeddings the length 1, as OpenAI's have it."""

    def pooling_params(self, size: int, default: Pooling | None) -> SamplingParams:
        """Raises `InvalidRequestError` for what the fields, each right by itself, do not make together."""
        if not self.input:
            raise InvalidRequestError("input is empty", "input")
        if len(self.input) > MAX_SEQUENCES:
            raise InvalidRequestError(f"input has {len(self.input)} items, {MAX_SEQUENCES} at most", "input")
        if self.dimensions not in (None, size):
            raise InvalidRequestError(
                f"this model's embeddings have {size} dimensions, and lose their meaning when they are cut",
                "dimensions",
            )
        if self.pooling is None and default is None:
            raise InvalidRequestError(
                'this model was trained for embeddings of another kind than "mean" or "last": choose one',
                "pooling",
            )
        return SamplingParams(max_tokens=0, pooling=self.pooling or default)
