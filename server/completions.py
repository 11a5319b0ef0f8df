"""POST /v1/completions: continue a text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET, UnsetType

from scheduler.async_engine import Delta
from scheduler.messages import TokenLogprobs
from scheduler.tokenizer import Tokenizer
from server.admission import admitted
from server.app_keys import CONFIG, ENGINE
from server.generation import answer, check_model, tokenize
from server.openai_requests import CompletionRequest
from server.openai_responses import Completion, CompletionChoice, CompletionLogprobs, Usage, finite


@admitted
async def create_completion(request: web.Request) -> web.StreamResponse:
    body = CompletionRequest.model_validate_json(await request.read())
    check_model(request, body.model)
    params = body.sampling_params()
    tokenizer = request.app[ENGINE].tokenizer

    def encode() -> list[list[int]]:
        return [tokenizer.encode(text) if isinstance(text, str) else text for text in body.prompt]

    def echoed(prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    prompts = await tokenize(sum(map(len, body.prompt)), encode)
    prefixes = [echoed(prompt) if body.echo else "" for prompt in body.prompt for _ in range(params.n)]
    shape = CompletionShape(request.app[CONFIG].model_name, tokenizer, prefixes, body.include_usage)
    return await answer(request, body, prompts, params, shape)


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

    def chunk(self, choice: int, delta: Delta) -> Completion:
        return self._completion([self._choice(choice, delta)], None if self._include_usage else UNSET)

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, choices: Sequence[Delta], usage: Usage) -> Completion:
        return self._completion([self._choice(choice, delta) for choice, delta in enumerate(choices)], usage)

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
                {text_of(token_id): finite(logprob) for token_id, logprob in entry.top}
                | {token: finite(entry.logprob)}
                for token, entry in zip(tokens, logprobs, strict=True)
            ],
            text_offset=offsets,
        )
