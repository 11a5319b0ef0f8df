"""POST /tokenize and POST /detokenize, as vLLM has them: what the model makes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from aiohttp import web
from pydantic import Field

from scheduler.core.request import InvalidRequestError
from scheduler.text.tokenizer import Tokenizer
from server.api.chat_request import Message
from server.api.counting import counted
from server.api.fields import LIST, TEXT, Body, CheckedBody, TokenIds
from server.api.models import longest_sequence, served_model
from server.api.reading import read
from server.api.shape import check_fields
from server.app_keys import ENGINE
from server.http.json import encode
from server.http.record import RequestRecord


class TemplateFields(Body):
    """How the chat template words a conversation."""

    add_generation_prompt: bool = True
    """The template begins the assistant's turn."""
    continue_final_message: bool = False
    """The last message is not ended."""
    chat_template_kwargs: dict[str, Any] = {}
    """More variables of the template."""
    tools: Annotated[list[dict[str, Any]], LIST] = []
    """Those that the template tells of."""

    def tokens(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, longest: int, special: bool = False
    ) -> list[int]:
        """What the model reads. Raises `InvalidRequestError`."""
        return tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            longest=longest,
            add_special_tokens=special,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            tools=self.tools,
            variables=self.chat_template_kwargs,
        )


class TokenizeRequest(CheckedBody, TemplateFields):
    """A text, or a conversation."""

    model: str | None = None
    """By default, and where the name is none at /v1/models, the model that is served (`--unknown-models`)."""
    prompt: Annotated[str | None, TEXT] = None
    """A text."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's own tokens around it; by default around a text."""
    return_token_strs: bool = False
    """With what the tokens are called."""

    messages: Annotated[Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None, LIST] = None
    """A conversation, in place of a text."""


class DetokenizeRequest(CheckedBody):
    model: str | None = None
    """By default, and where the name is none at /v1/models, the model that is served (`--unknown-models`)."""
    tokens: Annotated[TokenIds, LIST]
    """Their numbers."""


class Tokens(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(msgspec.Struct, frozen=True):
    prompt: str


async def describe_tokenizer(request: web.Request) -> web.Response:
    """What vLLM tells at /tokenizer_info: the model's tokenizer_config.json, as it is used here."""
    engine = request.app[ENGINE]
    said = engine.tokenizer.description() | {"model_max_length": engine.info.max_model_len}
    return web.Response(body=encode(said), content_type="application/json")


async def tokenize(request: web.Request) -> web.Response:
    return await counted(request, _tokenize)


def _tokenize(app: web.Application, record: RequestRecord, content: bytes) -> Tokens:
    tokenizer, longest = app[ENGINE].tokenizer, longest_sequence(app[ENGINE].info)
    check_fields(content, TokenizeRequest, longest)
    body = read(app, record, content, TokenizeRequest)
    served_model(app, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give a prompt or messages", "prompt")
    if body.messages is not None:
        special = bool(body.add_special_tokens)
        token_ids = body.tokens(tokenizer, body.messages, longest=longest, special=special)
    else:
        token_ids = tokenizer.encode(body.prompt or "", body.add_special_tokens is not False, longest=longest)
    strings = [tokenizer.token_text(token) for token in token_ids] if body.return_token_strs else None
    return Tokens(len(token_ids), app[ENGINE].info.max_model_len, token_ids, strings)


async def detokenize(request: web.Request) -> web.Response:
    return await counted(request, _detokenize)


def _detokenize(app: web.Application, record: RequestRecord, content: bytes) -> Text:
    info = app[ENGINE].info
    check_fields(content, DetokenizeRequest, longest_sequence(info))
    body = read(app, record, content, DetokenizeRequest)
    served_model(app, body.model)
    if body.tokens and max(body.tokens) >= info.vocab_size:
        raise InvalidRequestError(f"tokens has token ids outside of 0 to {info.vocab_size - 1}", "tokens")
    return Text(app[ENGINE].tokenizer.decode(body.tokens, skip_special_tokens=False))
