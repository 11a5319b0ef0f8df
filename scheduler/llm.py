"""LLM: offline batches in this process, over the same EngineCore that serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, Unpack, cast

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from scheduler.client.stream import RequestStream, make_request
from scheduler.conversation import Message, ResponseFormat, held_to, pooling_of, prompt_of, tokens_of
from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.sampling import Pooling
from scheduler.core.step import TokenLogprobs
from scheduler.embedding import Embedding
from scheduler.execution.steering import LogitsProcessor
from scheduler.knobs import Knobs, config_of
from scheduler.models.files.model_source import resolve_model
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.text.grammar_checker import GrammarChecker
from scheduler.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Completion:
    """One sampled continuation."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    """Why it ended before its end."""


@dataclass(slots=True)
class Result:
    """What became of one prompt: its `n` completions."""

    prompt_token_ids: list[int]
    completions: list[Completion]
    num_cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache spared."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens but the first, if they were asked for."""
    embedding: Embedding | None = None
    """If that was asked for."""

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.completions[0].text


class LLM:
    """A model in this process. Takes the knobs of `EngineConfig` as keyword arguments.

    ```python
    llm = LLM(max_num_seqs=32)
    for result in llm.generate(["The sun is", "The moon is"], SamplingParams(max_tokens=20)):
        print(result.text)
    ```
    """

    def __init__(self, model: str | None = None, **knobs: Unpack[Knobs]) -> None:
        self.config = config_of(model, knobs)
        path = resolve_model(self.config.model)
        self.tokenizer = Tokenizer(path)
        self.engine = EngineCore(self.config, path)
        self._num_requests = 0
        self._checker: GrammarChecker | None = None

    def close(self) -> None:
        """Give back what it holds: memory, threads, and the process that tries grammars."""
        if self._checker is not None:
            self._checker.close()
        del self.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (it is frozen)
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: bool = True,
    ) -> list[Result]:
        """Complete every prompt (text, or token ids), all in one running batch; results are in the prompts' order.

        `logits_processors` change the logits of every prompt, one after the other: each is given the tokens so far
        and the logits of the next one. Raises `InvalidRequestError`, before anything is computed, if a prompt
        cannot be served. Ctrl-C aborts what is unfinished and leaves the engine usable.
        """
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if logits_processors:
            params = [msgspec.structs.replace(wish, has_processors=True) for wish in params]
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} SamplingParams")
        requests = [self._request(prompt, wish) for prompt, wish in zip(prompts, params, strict=True)]
        streams = {request.request_id: RequestStream(request, self.tokenizer) for request in requests}
        results = {
            request.request_id: Result(
                request.prompt_token_ids,
                [Completion() for _ in range(request.params.n)],
                embedding=Embedding(
                    request.params.pooling, len(request.prompt_token_ids), self.engine.info.embedding_layers
                )
                if request.params.pooling is not None
                else None,
            )
            for request in requests
        }
        self._check_grammars(requests)
        for request in requests:
            if logits_processors:
                self.engine.steerings.process(request.request_id, logits_processors)
            for output in self.engine.add(request):
                streams[request.request_id].push(output)
                results[request.request_id].completions[output.index].error = output.error
        with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=not progress) as bar:
            try:
                self._run(streams, results, bar)
            finally:
                for request_id, stream in streams.items():
                    if not stream.finished:
                        self.engine.abort(request_id)
        return [results[request.request_id] for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: ResponseFormat = None,
        progress: bool = True,
    ) -> list[Result]:
        """Answer a conversation, or each of several, all in one running batch; results are in their order. Calls
        of `tools` are in the text, as the model writes them. Raises `InvalidRequestError`, before anything is
        computed, if one cannot be served."""
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [prompt_of(self.tokenizer, cast("Sequence[Message]", each), tools) for each in several]
        wishes = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        return self.generate(prompts, [held_to(wish, response_format) for wish in wishes], progress=progress)

    def score(
        self, prompts: Sequence[str | list[int]], *, alternatives: int = 0, progress: bool = True
    ) -> list[list[TokenLogprobs]]:
        """For each prompt, the log-probability of each of its tokens but the first, given those before it, with so
        many of the likeliest `alternatives`. Raises `InvalidRequestError` if a prompt cannot be served."""
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=alternatives)
        return [result.prompt_logprobs for result in self.generate(prompts, params, progress=progress)]

    def embed(
        self,
        prompts: Sequence[str | list[int]],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        progress: bool = True,
    ) -> npt.NDArray[np.float32]:
        """A vector for each prompt, [prompts, dimensions]: the mean of its tokens' last hidden states, or the
        last token's, as `pooling` or else the model's folder says. Raises `InvalidRequestError` if a prompt cannot
        be served."""
        pooling = pooling_of(self.engine.info.pooling, pooling)
        results = self.generate(prompts, SamplingParams(max_tokens=0, pooling=pooling), progress=progress)
        return np.stack([each.embedding.vector(normalize=normalize) for each in results if each.embedding])

    def _check_grammars(self, requests: Sequence[Request]) -> None:
        """Raises `InvalidRequestError` for one that cannot be served, and `NotCheckedError`."""
        for grammar in dict.fromkeys(request.params.grammar for request in requests):
            if grammar is None:
                continue
            if self._checker is None:
                self.engine.learn_tokenizer(self.tokenizer.definition())
                self._checker = GrammarChecker(self.tokenizer.definition, self.engine.info.eos_token_ids)
            self._checker.check(grammar)

    def _request(self, prompt: str | list[int], params: SamplingParams) -> Request:
        token_ids = tokens_of(self.tokenizer, prompt)
        self._num_requests += 1
        return make_request(str(self._num_requests), token_ids, params, self.engine.info, self.tokenizer)

    def _run(self, streams: dict[str, RequestStream], results: dict[str, Result], bar: Any) -> None:
        num_tokens = 0
        while self.engine.has_work:
            for output in self.engine.step().outputs:
                stream = streams[output.request_id]
                delta = stream.push(output)
                if delta is None:
                    continue
                result = results[output.request_id]
                result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
                result.prompt_logprobs += delta.result.scored
                if result.embedding is not None:
                    result.embedding.add(delta.result.pooled)
                completion = result.completions[delta.index]
                completion.text += delta.text
                completion.token_ids += delta.token_ids
                if delta.result.logprobs:
                    completion.logprobs = (completion.logprobs or []) + delta.result.logprobs
                num_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    completion.finish_reason = delta.finish_reason
                    completion.stop_reason = delta.output.stop_reason
                    completion.error = delta.output.error
                    if output.finish_reason is None:  # met a stop string
                        self.engine.abort(output.request_id, output.index, FinishReason.STOP)
                if stream.finished:
                    bar.update()
            elapsed = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{num_tokens / elapsed:.0f} tokens/s", refresh=False)


__all__ = ["LLM", "Completion", "InvalidRequestError", "Result", "SamplingParams"]
