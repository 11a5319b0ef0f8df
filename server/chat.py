"""POST /v1/chat/completions: continue a conversation, worded by the model's chat template."""

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
from server.openai_requests import ChatRequest
from server.openai_responses import (
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


@admitted
async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    body = ChatRequest.model_validate_json(await request.read())
    check_model(request, body.model)
    params = body.sampling_params()
    tokenizer = request.app[ENGINE].tokenizer
    messages = [message.for_template() for message in body.messages]
    num_characters = sum(len(message["content"]) for message in messages)
    prompt = await tokenize(num_characters, lambda: tokenizer.apply_chat_template(messages))
    shape = ChatShape(request.app[CONFIG].model_name, tokenizer, body.include_usage)
    return await answer(request, body, [prompt], params, shape)


class ChatShape:
    """Words the answers of /v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, include_usage: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._introduced: set[int] = set()
        """The choices whose first chunk, which names the role, is out."""

    def chunk(self, choice: int, delta: Delta) -> ChatCompletionChunk:
        role = UNSET if choice in self._introduced else "assistant"
        self._introduced.add(choice)
        chunk = ChatChunkChoice(
            index=choice,
            delta=ChatDelta(role=role, content=delta.text),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
        )
        return self._chunk([chunk], None if self._include_usage else UNSET)

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Delta], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=choice,
                    message=ChatMessage(content=delta.text),
                    logprobs=self._logprobs(delta.logprobs),
                    finish_reason=delta.finish_reason,
                )
                for choice, delta in enumerate(choices)
            ],
            usage=usage,
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
        return ChatLogprobs([self._logprob(entry) for entry in logprobs])

    def _logprob(self, entry: TokenLogprobs) -> ChatLogprob:
        token = self._token(entry.token_id, entry.logprob)
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return ChatLogprob(token.token, token.logprob, token.bytes, top)

    def _token(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._tokenizer.token_text(token_id)
        in_utf8 = None if "\ufffd" in text else list(text.encode())
        return TopLogprob(text, finite(logprob), in_utf8)
