"""POST /v1/embeddings: what the model makes of a text, as a vector."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from aiohttp import web

from scheduler.client.async_engine import Delta
from scheduler.embedding import Embedding
from server.api.completion_objects import EmbeddingAnswer, EmbeddingList, EmbeddingUsage, Usage
from server.api.embedding_request import EmbeddingRequest
from server.api.generation import Asked, answer, truncated
from server.api.models import longest_sequence, served_model
from server.api.reading import read
from server.api.shape import check_embedding
from server.api.wording import ChunkedWording, Wording
from server.app_keys import ENGINE, LIMITS
from server.http.record import RequestRecord


async def create_embeddings(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_embedding, prompt_field="input")


def understand_embedding(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    longest = longest_sequence(app[ENGINE].info)
    check_embedding(content, longest=longest, max_tokens=app[LIMITS].max_queued_tokens)
    return embedding_of(app, read(app, record, content, EmbeddingRequest), EmbeddingWording)


def embedding_of(
    app: web.Application,
    body: EmbeddingRequest,
    wording: Callable[[str, EmbeddingRequest, list[Embedding]], Wording],
) -> Asked:
    """What a body asks. Raises whatever is wrong with it."""
    tokenizer, info = app[ENGINE].tokenizer, app[ENGINE].info
    longest = longest_sequence(info)
    model = served_model(app, body.model)
    params = body.pooling_params(info.embedding_size, info.pooling)

    def tokens(item: str | list[int]) -> list[int]:
        if isinstance(item, str):
            special = body.add_special_tokens is not False
            item = tokenizer.encode(item, special, longest=longest, cut=bool(body.truncate_prompt_tokens))
        return truncated(body, item, longest)

    prompts = list(map(tokens, body.input))
    assert params.pooling is not None
    embeddings = [Embedding(params.pooling, len(prompt), info.embedding_layers) for prompt in prompts]
    return Asked(body, prompts, params, wording(model, body, embeddings), None)


class EmbeddingWording(ChunkedWording):
    """Words the answers of /v1/embeddings."""

    def __init__(self, model: str, body: EmbeddingRequest, embeddings: Sequence[Embedding]) -> None:
        self.id = f"embd-{uuid.uuid4().hex}"
        self.model = model
        self._body = body
        self._embeddings = embeddings

    def take(self, choice: int, delta: Delta) -> None:
        self._embeddings[choice].add(delta.result.pooled)

    def whole(self, usage: Usage) -> msgspec.Struct:
        data = [EmbeddingAnswer(place, self._worded(vector)) for place, vector in enumerate(self.vectors())]
        return EmbeddingList(data, self.model, EmbeddingUsage(usage.prompt_tokens, usage.total_tokens))

    def vectors(self) -> list[npt.NDArray[np.float32]]:
        """One for each input."""
        return [embedding.vector(normalize=self._body.normalize) for embedding in self._embeddings]

    def _worded(self, vector: npt.NDArray[np.float32]) -> str | list[float]:
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers

    def chunk(self, choice: int, delta: Delta, usage: object) -> Sequence[msgspec.Struct]:
        raise AssertionError("embeddings are not streamed")

    def closing(self, usage: Usage) -> Sequence[msgspec.Struct]:
        raise AssertionError("embeddings are not streamed")
