"""No field is read and then ignored: each changes something, or says that it does not, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from pydantic.fields import FieldInfo

import server.openapi  # and so all models
from scheduler.core.request import FinishReason
from scheduler.text.tokenizer import Tokenizer
from server.api.fields import Body, NoEffect, Only
from tests.server.scripted import ScriptedEngine, serving, token
from tests.server.serving import Json

HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NAMED = {"type": "function", "function": {"name": "f"}}
SUBSET = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
THOUGHT = {"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b", "tool_calls": [CALL]}
SCHEMA = {"type": "object"}
OPTIONS = {"disable_any_whitespace": True, "disable_additional_properties": True, "whitespace_pattern": " "}
PART = {"type": "input_text", "text": "a", "refusal": "b"}
BATCH = {"input_file_id": "a", "endpoint": "/v1/completions", "completion_window": "24h", "metadata": {}}
REFERENCE = {"input": [{"type": "item_reference", "id": "x"}]}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "a", "is_error": True}
OTHERS = [
    {"type": "document", "title": "a", "context": "b", "source": {"type": "text", "data": "c"}},
    {"type": "search_result", "title": "a", "source": "b", "content": [{"type": "text", "text": "c"}]},
    {"type": "web_search_result", "title": "a", "url": "b"},
    {"type": "tool_reference", "tool_name": "f"},
    {"type": "server_tool_use", "id": "2", "name": "f", "input": {}},
    {"type": "web_search_tool_result", "tool_use_id": "2", "content": []},
]

ASKED: list[tuple[str, Json]] = [
    (
        "/v1/chat/completions",
        {
            "messages": [
                THOUGHT,
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a", "refusal": "b"}]},
                {"role": "user", "name": "ada", "content": [{"type": "refusal", "refusal": "b"}]},
            ],
            "tools": TOOLS,
            "tool_choice": SUBSET,
            "prediction": {"content": "a"},
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    ("/v1/chat/completions", {"messages": HI, "tools": TOOLS, "tool_choice": NAMED, "best_of": 1}),
    (
        "/v1/chat/completions",
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "json_object", "schema": SCHEMA}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": SCHEMA, **OPTIONS}}),
    ("/v1/completions", {"prompt": "a", "use_beam_search": True, "early_stopping": True}),
    ("/v1/completions", {"prompt": [[5, 6]], "truncate_prompt_tokens": 1, "truncation_side": "right"}),
    ("/v1/embeddings", {"input": "a", "normalize": False}),
    (
        "/v1/responses",
        {
            "input": [
                {"type": "message", "role": "user", "content": [PART]},
                {"type": "reasoning", "content": "a", "summary": "b"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "a"},
                {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "a"},
            ],
            "tools": [
                {"type": "function", **FUNCTION},
                {"type": "custom", "name": "g", "format": {"type": "text"}},
                {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}]},
            ],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
            "reasoning": {"effort": "low"},
            "max_output_tokens": 5,
        },
    ),
    (
        "/v1/messages",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}, *OTHERS, USE]},
                {"role": "user", "content": [RESULT, {"type": "text", "text": "a"}]},
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True}],
            "tool_choice": {"type": "tool", "name": "f"},
            "max_tokens": 5,
        },
    ),
    (
        "/v1/messages",
        {
            "messages": HI,
            "thinking": {"type": "enabled"},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
            "max_tokens": 5,
        },
    ),
    ("/v1/messages/count_tokens", {"messages": HI}),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/tokenize", {"messages": HI, "tools": TOOLS}),
    ("/detokenize", {"tokens": [5]}),
    ("/api/chat", {"messages": HI, "tools": TOOLS, "format": SCHEMA, "stream": False}),
    ("/api/generate", {"prompt": "a", "system": "b"}),
    ("/api/generate", {"prompt": "a", "raw": True, "stream": True}),
    ("/api/embed", {"input": "a"}),
    ("/api/show", {"name": "n"}),
    ("/completion", {"prompt": ["a"], "n_probs": 1, "return_tokens": True}),
    ("/completion", {"prompt": "a", "stream": True}),
    ("/apply-template", {"messages": HI, "tools": TOOLS}),
    ("/v1/responses", REFERENCE),
    ("/v1/batches", BATCH),
]

NOT_HERE = {
    *(("BatchRequest", name) for name in ("endpoint", "completion_window", "metadata")),
    *(("OllamaGenerateRequest", name) for name in ("prompt", "system")),
    *(("InfillRequest", name) for name in ("prompt", "input_prefix", "input_suffix")),
    ("OllamaFields", "format"),
    ("OllamaEmbedRequest", "truncate"),
}
"""Of a batch whose file is there (`test_batches.py`), of models that fill in the middle (`test_llama_cpp.py`), and
what is put in other words before it is validated (`test_ollama.py`)."""

Field = tuple[str, str]


def models(base: type[Body] = Body) -> Iterator[type[Body]]:
    for model in base.__subclasses__():
        if model.__module__.startswith("server."):
            yield model
            yield from models(model)


def owner(model: type[Body], name: str) -> Field:
    """Where a field is defined, and its name."""
    return next(each.__name__ for each in model.__mro__ if name in inspect.get_annotations(each)), name


def all_fields() -> dict[Field, FieldInfo]:
    return {owner(model, name): info for model in models() for name, info in model.model_fields.items()}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[Field]:
    """The fields that are looked at from now on, or put into what is sent on."""
    seen: set[Field] = set()
    dump = Body.model_dump

    def look(self: Body, name: str) -> Any:
        if name in type(self).model_fields:
            seen.add(owner(type(self), name))
        return object.__getattribute__(self, name)

    def dumped(self: Body, **options: Any) -> dict[str, Any]:
        for name in options.get("include") or type(self).model_fields:
            seen.add(owner(type(self), name))
            value = self.__dict__.get(name)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Body):
                    dumped(each)
        return dump(self, **options)

    monkeypatch.setattr(Body, "__getattribute__", look)
    monkeypatch.setattr(Body, "model_dump", dumped)
    return seen


async def test_every_field_is_read_or_says_that_it_is_not(
    read: set[Field], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert server.openapi.BODIES
    engine = ScriptedEngine(token(" end", finish_reason=FinishReason.STOP))
    engine.tokenizer = tokenizer
    async with serving(engine, batches=tmp_path / "batches") as client:
        for path, body in ASKED:
            async with client.post(path, json=body) as response:
                answer = await response.text()
                assert response.status == (404 if body in (BATCH, REFERENCE) else 200), (path, answer)
    fields = all_fields()
    silent = {
        field
        for field, info in fields.items()
        if any(isinstance(mark, NoEffect | Only) for mark in info.metadata) or is_kind(field, info)
    }
    assert fields.keys() - read - silent == NOT_HERE
    assert {("ServedRequest", "user"), ("SampledRequest", "mirostat")} <= silent


def is_kind(field: Field, info: FieldInfo) -> bool:
    """What tells the members of a union apart: validating it is reading it."""
    return field[1] == "type" and get_origin(info.annotation) is Literal
