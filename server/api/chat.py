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
from scheduler.engine.stream import with_phrases
from scheduler.sampling_params import InvalidRequestError
from scheduler.step import TokenLogprobs
from scheduler.text.tokenizer import Tokenizer
from server.api.chat_request import ChatRequest
from server.api.generation import Asked, answer, truncated
from server.api.logprobs import LogprobWords
from server.api.models import check_model, longest_sequence
from server.api.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Usage,
)
from server.api.shape import check_chat, drop_unknown
from server.app_keys import CONFIG, ENGINE


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    return await answer(request, _understand, prompt_field="messages")


def _understand(app: web.Application, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    tokenizer, info = app[ENGINE].tokenizer, app[ENGINE].info
    longest = longest_sequence(info)
    if app[CONFIG].unknown_fields == "warn":
        content = drop_unknown(content, ChatRequest)
    check_chat(content, longest=longest)
    body = ChatRequest.model_validate_json(content)
    check_model(app, body.model)
    if body.chat_template is not None and not app[CONFIG].trust_request_chat_template:
        raise InvalidRequestError(
            "chat_template is a program: the server runs its own only, unless it is started with "
            "--trust-request-chat-template",
            "chat_template",
        )
    params = with_phrases(body.sampling_params(info.sampling_defaults), tokenizer)
    prompt = tokenizer.apply_chat_template(
        [message.for_template() for message in body.messages],
        longest=None if body.truncate_prompt_tokens else longest,
        add_special_tokens=bool(body.add_special_tokens),
        template=body.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.template_variables,
    )
    prompt = truncated(body, prompt, longest - (params.max_tokens or 1))
    shape = ChatShape(body.model or app[CONFIG].model_name, tokenizer, body, prompt)
    return Asked(body, [prompt], params, shape)


class ChatShape:
    """Words the answers of /v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, body: ChatRequest, prompt: list[int]) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._prompt = prompt
        self._scored: list[TokenLogprobs] = []
        self._words = LogprobWords(tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._echoed = body.messages[-1].text if body.echo and body.continue_final_message else ""
        self._introduced: set[int] = set()
        """The choices whose first chunk, which names the role, is out."""
        self._parts: list[list[ChatChunkChoice]] = [[] for _ in range(body.n)]
        """What was taken of each choice."""

    def chunk(self, choice: int, delta: Delta, usage: Usage | UnsetType | None) -> ChatCompletionChunk | None:
        said = self._choice(choice, delta)
        return None if said is None else self._chunk([said], usage)

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk([], usage)

    def take(self, choice: int, delta: Delta) -> None:
        said = self._choice(choice, delta)
        if said is not None:
            self._parts[choice].append(said)

    def whole(self, usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[_joined(parts) for parts in self._parts],
            usage=usage,
            prompt_logprobs=self._prompt_logprobs(),
            prompt_token_ids=self._prompt if self._body.return_token_ids else UNSET,
        )

    def _choice(self, choice: int, delta: Delta) -> ChatChunkChoice | None:
        """What there is to say; None for nothing."""
        self._scored.extend(delta.prompt_logprobs)
        wants_ids = self._body.return_token_ids
        if not (delta.text or delta.logprobs or delta.finish_reason or (wants_ids and delta.token_ids)):
            return None
        is_first = choice not in self._introduced
        self._introduced.add(choice)
        return ChatChunkChoice(
            index=choice,
            delta=ChatDelta(
                role="assistant" if is_first else UNSET, content=(self._echoed if is_first else "") + delta.text
            ),
            logprobs=None if delta.logprobs is None else ChatLogprobs(self._words.of_chat(delta.logprobs)),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if delta.finish_reason is not None else UNSET,
            token_ids=delta.token_ids if wants_ids else UNSET,
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

    def _prompt_logprobs(self) -> list[msgspec.Raw] | None:
        if self._body.prompt_logprobs is None:
            return None
        return [msgspec.Raw(b"null"), *self._words.of_prompt(self._scored)]


def _joined(parts: Sequence[ChatChunkChoice]) -> ChatChoice:
    """All that one sequence produced, as if one step had."""
    logprobs = [part.logprobs.content for part in parts if part.logprobs is not None]
    token_ids = [part.token_ids for part in parts if not isinstance(part.token_ids, UnsetType)]
    return ChatChoice(
        index=parts[-1].index,
        message=ChatMessage(content="".join(part.delta.content or "" for part in parts)),
        logprobs=ChatLogprobs(list(chain.from_iterable(logprobs))) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason or None,
        token_ids=list(chain.from_iterable(token_ids)) if token_ids else UNSET,
    )
