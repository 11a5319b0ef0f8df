"""A response, its items and the events of its stream, field for field."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.client.async_engine import Delta
from server.api.completion_objects import Usage


class InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage, num_reasoning: int) -> ResponseUsage:
        return cls(
            usage.prompt_tokens,
            InputDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputDetails(num_reasoning),
            usage.total_tokens,
        )


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Of a message, or of reasoning."""

    type: str
    text: str
    annotations: list[Any] | UnsetType = UNSET
    logprobs: list[msgspec.Raw] | UnsetType = UNSET


class Item(msgspec.Struct, kw_only=True):
    """Something that the model said, thought or called."""

    id: str
    type: str
    status: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    content: list[Part] | UnsetType = UNSET
    summary: list[Any] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    namespace: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET


class Response(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created_at: int
    status: str
    model: str
    output: list[Item]
    instructions: str | None
    max_output_tokens: int | None
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    metadata: dict[str, Any]
    usage: ResponseUsage | None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    object: str = "response"
    truncation: str
    background: bool = False
    service_tier: str = "default"


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Any of them; each has the fields of its type."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: msgspec.Raw | UnsetType = UNSET
    part: Part | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    logprobs: list[msgspec.Raw] | UnsetType = UNSET
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET


def status_of(delta: Delta) -> str:
    return "incomplete" if delta.finish_reason == "length" else "completed"
