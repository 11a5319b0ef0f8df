"""POST /v1/chat/completions: continue a conversation, worded by the model's chat template."""

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
from server.api.requests import ChatRequest
from server.api.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
    Usage,
    finite,
)
from server.api.shape import check_chat
from server.app_keys import CONFIG, ENGINE
from server.http.json import encode


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    return await answer(request, _understand)


def _understand(app: web.Application, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    tokenizer, longest = app[ENGINE].tokenizer, longest_sequence(app[ENGINE].info)
    check_chat(content, longest=longest)
    body = ChatRequest.model_validate_json(content)
    check_model(app, body.model)
    params = body.sampling_params()
    messages = [message.for_template() for message in body.messages]
    prompt = tokenizer.apply_chat_template(messages, longest=longest)
    shape = ChatShape(app[CONFIG].model_name, tokenizer, params.n, body.include_usage)
    return Asked(body, [prompt], params, shape)


class ChatShape:
    """Words the answers of /v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, n: int, include_usage: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._introduced: set[int] = set()
        """The choices whose first chunk, which names the role, is out."""
        self._parts: list[list[ChatChunkChoice]] = [[] for _ in range(n)]
        """What was taken of each choice."""

    def chunk(self, choice: int, delta: Delta) -> ChatCompletionChunk:
        return self._chunk([self._choice(choice, delta)], None if self._include_usage else UNSET)

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk([], usage)

    def take(self, choice: int, delta: Delta) -> None:
        self._parts[choice].append(self._choice(choice, delta))

    def whole(self, usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[_joined(parts) for parts in self._parts],
            usage=usage,
        )

    def _choice(self, choice: int, delta: Delta) -> ChatChunkChoice:
        role = UNSET if choice in self._introduced else "assistant"
        self._introduced.add(choice)
        return ChatChunkChoice(
            index=choice,
            delta=ChatDelta(role=role, content=delta.text),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprobs] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs([msgspec.Raw(encode(self._logprob(entry))) for entry in logprobs])

    def _logprob(self, entry: TokenLogprobs) -> ChatLogprob:
        token = self._token(entry.token_id, entry.logprob)
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return ChatLogprob(token.token, token.logprob, token.bytes, top)

    def _token(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._tokenizer.token_text(token_id)
        in_utf8 = None if "\ufffd" in text else list(text.encode())
        return TopLogprob(text, finite(logprob), in_utf8)


def _joined(parts: Sequence[ChatChunkChoice]) -> ChatChoice:
    """All that one sequence produced, as if one step had."""
    logprobs = [part.logprobs.content for part in parts if part.logprobs is not None]
    return ChatChoice(
        index=parts[-1].index,
        message=ChatMessage(content="".join(part.delta.content or "" for part in parts)),
        logprobs=ChatLogprobs(list(chain.from_iterable(logprobs))) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
    )
