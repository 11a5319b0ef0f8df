"""POST /v1/completions: continue a text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from scheduler.client.async_engine import Delta
from scheduler.client.stream import with_phrases
from scheduler.core.step import TokenLogprobs
from scheduler.text.tokenizer import Tokenizer
from server.api.completion_objects import Completion, CompletionChoice, CompletionLogprobs, Usage
from server.api.completion_request import CompletionRequest
from server.api.explanation import Explainer
from server.api.generation import Asked, answer, truncated
from server.api.logprobs import LogprobWords, TextOffsets
from server.api.models import longest_sequence, served_model
from server.api.reading import read
from server.api.shape import check_completion
from server.api.wording import ChunkedWording, Wording
from server.app_keys import CONFIG, ENGINE, LIMITS
from server.http.record import RequestRecord


async def create_completion(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_completion, prompt_field="prompt")


def understand_completion(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    longest = longest_sequence(app[ENGINE].info)
    check_completion(content, longest=longest, max_tokens=app[LIMITS].max_queued_tokens)
    body = read(app, record, content, CompletionRequest)
    return completion_of(app, body, partial(CompletionWording, app[ENGINE].tokenizer, body))


def completion_of(
    app: web.Application, body: CompletionRequest, wording: Callable[[str, list[Prompt], int], Wording]
) -> Asked:
    """What a body asks. Raises whatever is wrong with it."""
    tokenizer, info = app[ENGINE].tokenizer, app[ENGINE].info
    longest = longest_sequence(info)
    model = served_model(app, body.model)
    params = with_phrases(body.sampling_params(info.sampling_defaults, app[CONFIG].max_logprobs), tokenizer)
    prompts: list[Prompt] = []
    for prompt in body.prompt:
        if not isinstance(prompt, str):
            token_ids = prompt
        elif body.suffix:
            token_ids = tokenizer.fill_in_the_middle(prompt, body.suffix, longest=longest)
        else:
            special = body.add_special_tokens is not False
            token_ids = tokenizer.encode(prompt, special, longest=longest, cut=bool(body.truncate_prompt_tokens))
        kept = truncated(body, token_ids, longest - (1 if params.max_tokens is None else params.max_tokens))
        text = ""
        if body.echo:
            text = prompt if isinstance(prompt, str) and kept is token_ids else tokenizer.decode(kept)
        prompts.append(Prompt(kept, text))
    token_ids_of = [prompt.token_ids for prompt in prompts]
    return Asked(body, token_ids_of, params, wording(model, prompts, params.n), body.form(), body.beams(params))


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str
    """What the answer says of it."""
    scored: list[TokenLogprobs] = field(default_factory=list)
    """The log-probabilities of its tokens but the first, as far as they are known."""


class CompletionWording(ChunkedWording):
    """Words the answers of /v1/completions. `num_sequences` are sampled of each prompt."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: CompletionRequest,
        model: str,
        prompts: Sequence[Prompt],
        num_sequences: int,
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._prompts = prompts
        self._num_sequences = num_sequences
        self._words = LogprobWords(tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._offsets = [TextOffsets() for _ in range(len(prompts) * num_sequences)]
        self._explainers = [Explainer(tokenizer, each.token_ids) for each in prompts for _ in range(num_sequences)]
        self._parts: list[list[CompletionChoice]] = [[] for _ in self._offsets]
        """What was taken of each choice."""
        self._begun: set[int] = set()
        """The choices of which something was said."""
        self._log_total = [0.0 for _ in self._offsets]
        self._num_tokens = [0 for _ in self._offsets]

    def chunk(self, choice: int, delta: Delta, usage: Usage | UnsetType | None) -> Sequence[Completion]:
        said = self._choice(choice, delta)
        return () if said is None else [self._completion([said], usage)]

    def closing(self, usage: Usage) -> Sequence[Completion]:
        return [self._completion([], usage)] if self._body.include_usage else ()

    def take(self, choice: int, delta: Delta) -> None:
        said = self._choice(choice, delta)
        if said is not None:
            self._parts[choice].append(said)
        for entry in delta.result.logprobs:
            self._log_total[choice] += entry.logprob
            self._num_tokens[choice] += 1

    def whole(self, usage: Usage) -> Completion:
        choices: list[CompletionChoice] = []
        for first in range(0, len(self._parts), self._num_sequences):
            candidates = range(first, first + self._num_sequences)
            chosen = sorted(candidates, key=self._mean_logprob, reverse=True)[: self._body.n]
            for choice in chosen if self._num_sequences > self._body.n else candidates:
                choices.append(_joined(len(choices), self._parts[choice]))
        return self._completion(choices, usage)

    def _mean_logprob(self, choice: int) -> float:
        return self._log_total[choice] / max(1, self._num_tokens[choice])

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _choice(self, choice: int, delta: Delta) -> CompletionChoice | None:
        """What there is to say; None for nothing."""
        prompt = self._prompts[choice // self._num_sequences]
        prompt.scored.extend(delta.result.scored)
        wants_ids = self._body.return_token_ids
        self._explainers[choice].take(delta)
        if not (delta.text or delta.result.logprobs or delta.finish_reason or (wants_ids and delta.token_ids)):
            return None
        is_first = choice not in self._begun
        self._begun.add(choice)
        return CompletionChoice(
            index=choice,
            text=(prompt.text if is_first else "") + delta.text,
            logprobs=self._logprobs(choice, delta, prompt if is_first and self._body.echo else None),
            finish_reason=delta.finish_reason,
            stop_reason=delta.output.stop_reason,
            prompt_logprobs=self._prompt_logprobs(prompt) if is_first else UNSET,
            token_ids=delta.token_ids if wants_ids else UNSET,
            prompt_token_ids=prompt.token_ids if wants_ids and is_first else UNSET,
            explanation=self._explainers[choice].pop(),
        )

    def _logprobs(self, choice: int, delta: Delta, echoed: Prompt | None) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        entries: list[TokenLogprobs | None] = list(delta.result.logprobs)
        token_ids = delta.token_ids
        if echoed is not None:
            entries = [None, *echoed.scored, *entries]
            token_ids = [*echoed.token_ids, *token_ids]
        return self._words.of_completion(entries, token_ids, self._offsets[choice])

    def _prompt_logprobs(self, prompt: Prompt) -> list[msgspec.Raw] | None:
        if self._body.prompt_logprobs is None:
            return None
        return [msgspec.Raw(b"null"), *self._words.of_prompt(prompt.scored)]


def _joined(index: int, parts: Sequence[CompletionChoice]) -> CompletionChoice:
    """All that one sequence produced, as if one step had."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    token_ids = [part.token_ids for part in parts if not isinstance(part.token_ids, UnsetType)]
    explained = [part.explanation for part in parts if not isinstance(part.explanation, UnsetType)]
    return CompletionChoice(
        index=index,
        text="".join(part.text for part in parts),
        logprobs=CompletionLogprobs(
            tokens=list(chain.from_iterable(each.tokens for each in logprobs)),
            token_logprobs=list(chain.from_iterable(each.token_logprobs for each in logprobs)),
            top_logprobs=list(chain.from_iterable(each.top_logprobs for each in logprobs)),
            text_offset=list(chain.from_iterable(each.text_offset for each in logprobs)),
        )
        if logprobs
        else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        prompt_logprobs=parts[0].prompt_logprobs,
        token_ids=list(chain.from_iterable(token_ids)) if token_ids else UNSET,
        prompt_token_ids=parts[0].prompt_token_ids,
        explanation=list(chain.from_iterable(explained)) if explained else UNSET,
    )
