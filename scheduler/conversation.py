"""A conversation as a Python program has it: to a prompt, and to the form that its answer is held to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from scheduler.grammar_spec import GrammarKind, GrammarSpec
from scheduler.sampling_params import InvalidRequestError, SamplingParams
from scheduler.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
"""`role` and `content`, as OpenAI has them, or whatever else the model's chat template reads."""

ResponseFormat: TypeAlias = GrammarSpec | Mapping[str, Any] | None
"""A grammar, or OpenAI's {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}."""


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
