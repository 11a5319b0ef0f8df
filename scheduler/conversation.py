"""What a Python program asks, in its own types: to a prompt, and to what is wanted of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec, Pooling
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
"""`role` and `content`, as OpenAI has them, or whatever else the model's chat template reads."""

ResponseFormat: TypeAlias = GrammarSpec | Mapping[str, Any] | None
"""A grammar, or OpenAI's {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}."""


def tokens_of(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    """A copy, where they are tokens already."""
    return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def pooling_of(own: Pooling | None, wanted: Pooling | None) -> Pooling:
    """The wanted one, or else the model's own. Raises `InvalidRequestError` where there is neither."""
    pooling = wanted or own
    if pooling is None:
        raise InvalidRequestError("this model does not say how it makes embeddings: choose one", "pooling")
    return pooling


def prompt_of(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[int]:
    """Raises `InvalidRequestError` where the model has no chat template, or that refuses the messages."""
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InvalidRequestError(f"a message needs a role and a content, both texts: {message!r}", "messages")
    return tokenizer.apply_chat_template(messages, tools=list(tools) if tools else None)


def held_to(params: SamplingParams, wanted: ResponseFormat) -> SamplingParams:
    """The same for an answer of that form. Raises `InvalidRequestError` for a form that is none."""
    match wanted:
        case None | {"type": "text"}:
            return params
        case GrammarSpec():
            grammar = wanted
        case {"type": "json_object"}:
            grammar = GrammarSpec(GrammarKind.JSON_OBJECT)
        case {"type": "json_schema", "json_schema": {"schema": schema, **more}}:
            grammar = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema), bool(more.get("strict")))
        case _:
            raise InvalidRequestError(
                'response_format should be a GrammarSpec, {"type": "json_object"}, or {"type": "json_schema", '
                f'"json_schema": {{"schema": ...}}}}, got {wanted!r}',
                "response_format",
            )
    return msgspec.structs.replace(params, grammar=grammar)
