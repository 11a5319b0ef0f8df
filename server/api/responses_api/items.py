"""What a conversation of POST /v1/responses has beside messages: calls of tools, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from server.api.ask import call_for_template
from server.api.fields import SAID, Body, ShortText
from server.api.responses_api.tools import flat_name
from server.api.unread import in_place_of

Json = dict[str, Any]

SELF_CONTAINED = frozenset({"code_interpreter_call", "file_search_call", "image_generation_call", "mcp_call"})
"""Calls that a hosted API answered itself: what came of them is in them."""

SILENT = frozenset(
    {
        "additional_tools",
        "compaction",
        "compaction_trigger",
        "configuration_update",
        "context_compaction",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_list_tools",
        "program",
        "program_output",
        "web_search_call",
    }
)
"""Items that say nothing to the model: what is in them is encrypted, or nothing, or for another server."""

OUTPUT = "_output"
CALL = "_call"


APART = ("message", "function_call", "function_call_output", "reasoning")
"""Items that have models of their own."""


def _known(kind: str) -> str:
    if kind in APART:
        raise PydanticCustomError("apart", "is another item")
    if not (kind in SILENT or kind.endswith((CALL, OUTPUT))):
        raise PydanticCustomError(SAID, "has an item of type {kind}, which is not known here", {"kind": kind[:40]})
    return kind


class ToolItem(Body):
    """A call of any tool, or the output of one. Which fields it has depends on its type."""

    type: Annotated[ShortText, AfterValidator(_known)]
    id: str = ""
    call_id: str = ""
    name: str = ""
    namespace: str = ""
    arguments: Any = None
    input: Any = None
    action: Any = None
    operation: Any = None
    code: Any = None
    queries: Any = None
    output: Any = None
    outputs: Any = None
    results: Any = None
    error: Any = None
    tools: Any = None


def tool_messages(item: Json) -> Iterator[tuple[Literal["call", "result"], Json]]:
    """What an item says to chat templates: calls are for an assistant's message, results are messages of their
    own."""
    kind = item["type"]
    if kind in SILENT:
        return
    call_id = item.get("call_id") or item.get("id") or ""
    if kind.endswith(OUTPUT):
        yield "result", {"role": "tool", "content": text_of(_first(item, *_OUTPUTS)), "tool_call_id": call_id}
        return
    name = item.get("name") or kind.removesuffix(CALL)
    arguments = _first(item, *_ARGUMENTS)
    if kind == "custom_tool_call":
        arguments = {"input": text_of(arguments)}
    elif isinstance(arguments, list):
        arguments = {"items": arguments}
    yield "call", call_for_template(call_id, flat_name(item.get("namespace") or "", name), arguments or {})
    if kind in SELF_CONTAINED:
        yield "result", {"role": "tool", "content": text_of(_first(item, *_OUTPUTS)), "tool_call_id": call_id}


_ARGUMENTS = ("arguments", "input", "action", "operation", "code", "queries")
_OUTPUTS = ("output", "outputs", "results", "error", "tools")


def _first(item: Json, *names: str) -> Any:
    """The value of the first of these fields that the item has."""
    return next((value for name in names if (value := item.get(name)) is not None), None)


def text_of(value: Any) -> str:
    """What came of a call, as text: parts as what they say, anything else as JSON."""
    match value:
        case None:
            return ""
        case str():
            return value
        case list() if value and all(isinstance(part, dict) for part in value):
            return "\n".join(_text_of_part(part) for part in value)
    return json.dumps(value, ensure_ascii=False)


def _text_of_part(part: Json) -> str:
    kind = str(part.get("type"))
    if "image" in kind or "screenshot" in kind:
        return in_place_of(kind)
    said = part.get("text")
    return said if isinstance(said, str) else json.dumps(part, ensure_ascii=False)


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def input_items(response_id: str, items: Sequence[Json]) -> list[Json]:
    """What was said before a response, as it is listed: with ids, and without fields that say nothing."""
    number = response_id.removeprefix("resp_")
    listed = []
    for place, item in enumerate(items):
        kind = item.get("type", "message")
        said = {name: value for name, value in item.items() if value not in (None, "")}
        said |= {"type": kind, "id": item.get("id") or f"{_PREFIXES.get(kind, 'item')}_{number}i{place:x}"}
        if kind == "message":
            part = "output_text" if item["role"] == "assistant" else "input_text"
            content = item["content"]
            texts = [{"text": content}] if isinstance(content, str) else content
            said["content"] = [
                {"type": part, **{name: value for name, value in text.items() if value != ""}} for text in texts
            ]
            said["status"] = "completed"
        listed.append(said)
    return listed
