"""POST /v1/completions: continue a text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from itertools import chain

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from scheduler.engine.client import Delta
from scheduler.step import TokenLogprobs
from scheduler.text.tokenizer import Tokenizer
from server.api.generation import Asked, answer, check_model, longest_sequence
from server.api.requests import CompletionRequest
from server.api.responses import Completion, CompletionChoice, CompletionLogprobs, Usage, finite
from server.api.shape import check_completion
from server.app_keys import CONFIG, ENGINE, LIMITS
from server.http.json import encode


async def create_completion(request: web.Request) -> web.StreamResponse:
    return await answer(request, _understand)


def _understand(app: web.Application, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    tokenizer, longest = app[ENGINE].tokenizer, longest_sequence(app[ENGINE].info)
    check_completion(content, longest=longest, max_tokens=app[LIMITS].max_queued_tokens)
    body = CompletionRequest.model_validate_json(content)
    check_model(app, body.model)
    params = body.sampling_params()
    prompts: list[list[int]] = []
    prefixes: list[str] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            text, tokens = prompt, tokenizer.encode(prompt, longest=longest)
        else:
            text, tokens = tokenizer.decode(prompt) if body.echo else "", prompt
        prompts.append(tokens)
        prefixes += [text if body.echo else ""] * params.n
    shape = CompletionShape(app[CONFIG].model_name, tokenizer, prefixes, body.include_usage)
    return Asked(body, prompts, params, shape)


class CompletionShape:
    """Words the answers of /v1/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, prefixes: list[str], include_usage: bool) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._prefixes = prefixes
        """What each choice still has to say before its own text: the prompt, if it is echoed."""
        self._offsets = [len(prefix) for prefix in prefixes]
        """Where the next token of each choice begins in its text."""
        self._include_usage = include_usage
        self._parts: list[list[CompletionChoice]] = [[] for _ in prefixes]
        """What was taken of each choice."""

    def chunk(self, choice: int, delta: Delta) -> Completion:
        return self._completion([self._choice(choice, delta)], None if self._include_usage else UNSET)

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def take(self, choice: int, delta: Delta) -> None:
        self._parts[choice].append(self._choice(choice, delta))

    def whole(self, usage: Usage) -> Completion:
        return self._completion([_joined(parts) for parts in self._parts], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _choice(self, choice: int, delta: Delta) -> CompletionChoice:
        prefix, self._prefixes[choice] = self._prefixes[choice], ""
        return CompletionChoice(
            index=choice,
            text=prefix + delta.text,
            logprobs=self._logprobs(choice, delta.logprobs) if delta.logprobs is not None else None,
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, choice: int, logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        text_of = self._tokenizer.token_text
        tokens = [text_of(entry.token_id) for entry in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(token)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[finite(entry.logprob) for entry in logprobs],
            top_logprobs=[
                # The chosen token is always among them.
                msgspec.Raw(
                    encode(
                        {text_of(token_id): finite(logprob) for token_id, logprob in entry.top}
                        | {token: finite(entry.logprob)}
                    )
                )
                for token, entry in zip(tokens, logprobs, strict=True)
            ],
            text_offset=offsets,
        )


def _joined(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    """All that one sequence produced, as if one step had."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=parts[-1].index,
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
    )
