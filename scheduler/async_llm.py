"""AsyncLLM: the engine in a process of its own, for programs on asyncio that have many conversations at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from scheduler.client.async_engine import AsyncEngine
from scheduler.client.stream import Delta, Ownership
from scheduler.client.supervisor import EngineDeadError
from scheduler.conversation import Message, ResponseFormat, held_to, pooling_of, prompt_of, tokens_of
from scheduler.core.sampling import Pooling
from scheduler.core.step import TokenLogprobs
from scheduler.embedding import Embedding
from scheduler.knobs import Knobs, config_of
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer


class AsyncLLM:
    """A model that answers whoever asks, all in one running batch. Takes the knobs of `EngineConfig` as keyword
    arguments.

    ```python
    async with AsyncLLM(max_num_seqs=32) as llm:
        async for delta in llm.generate("The sun is", SamplingParams(max_tokens=20)):
            print(delta.text, end="", flush=True)
    ```

    `**ownership` of its methods says whose a request is: `user`, `weight`, `priority`, `deadline` and others that
    `Request` explains. Without it all are of one user.
    """

    def __init__(self, model: str | None = None, **knobs: Unpack[Knobs]) -> None:
        self.config = config_of(model, knobs)
        self.engine = AsyncEngine(self.config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, once it has started."""
        return self.engine.tokenizer

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Load the model. Raises `EngineStartError`."""
        await self.engine.start()

    async def close(self) -> None:
        """End the engine's process. What is still running fails with `EngineDeadError`."""
        await self.engine.stop()

    def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008 (it is frozen)
        **ownership: Unpack[Ownership],
    ) -> AsyncGenerator[Delta, None]:
        """What each step adds to the answers, as it comes. Closing or cancelling the generator ends the request.
        Raises what `AsyncEngine.generate` raises."""
        token_ids = tokens_of(self.tokenizer, prompt)
        return self.engine.generate(token_ids, params, **ownership)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams = SamplingParams(),  # noqa: B008
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: ResponseFormat = None,
        **ownership: Unpack[Ownership],
    ) -> AsyncGenerator[Delta, None]:
        """The answer to a conversation, as the model writes it: calls of `tools` are in its text. Raises
        `InvalidRequestError`, and what `AsyncEngine.generate` raises."""
        prompt = prompt_of(self.tokenizer, messages, tools)
        return self.engine.generate(prompt, held_to(params, response_format), **ownership)

    async def embed(
        self,
        prompt: str | list[int],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        **ownership: Unpack[Ownership],
    ) -> npt.NDArray[np.float32]:
        """A vector, [dimensions], as `LLM.embed` makes it. Raises as `generate` does."""
        pooling = pooling_of(self.engine.info.pooling, pooling)
        token_ids = tokens_of(self.tokenizer, prompt)
        embedding = Embedding(pooling, len(token_ids), self.engine.info.embedding_layers)
        params = SamplingParams(max_tokens=0, pooling=pooling)
        for delta in await self._all(token_ids, params, ownership):
            embedding.add(delta.result.pooled)
        return embedding.vector(normalize=normalize)

    async def score(
        self, prompt: str | list[int], *, alternatives: int = 0, **ownership: Unpack[Ownership]
    ) -> list[TokenLogprobs]:
        """The log-probability of each token of a text but the first, as `LLM.score` gives it. Raises as `generate`
        does."""
        token_ids = tokens_of(self.tokenizer, prompt)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=alternatives)
        deltas = await self._all(token_ids, params, ownership)
        return [entry for delta in deltas for entry in delta.result.scored]

    async def _all(self, token_ids: list[int], params: SamplingParams, ownership: Ownership) -> list[Delta]:
        """Raises `EngineDeadError` where the engine failed on the request."""
        async with aclosing(self.engine.generate(token_ids, params, **ownership)) as stream:
            deltas = [delta async for delta in stream]
        for delta in deltas:
            if delta.output.error is not None:
                raise EngineDeadError(delta.output.error)
        return deltas
