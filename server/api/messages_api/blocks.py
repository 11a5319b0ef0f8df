"""What a turn of POST /v1/messages is made of, and what of it is text for a model that reads nothing else."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from server.api.fields import SAID, Body, ShortText, described
from server.api.unread import in_place_of

Json = dict[str, Any]

READABLE = ("document", "search_result", "tool_reference", "web_search_result")
"""Blocks that are text, or have some."""

UNREADABLE = ("container_upload", "image")

SILENT = frozenset(
    {"browser_state", "compaction", "fallback", "mcp_tool_listing", "tool_addition", "tool_removal"}
)
"""Blocks that say nothing to the model: what is in them is encrypted, or for another server."""

CALL, RESULT = "_tool_use", "_tool_result"
"""What the types of the calls of a server's tools end with, and those of their results."""

_APART = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
"""Blocks that have models of their own."""


def _known(kind: str) -> str:
    if kind in _APART:
        raise PydanticCustomError("apart", "is another block")
    if not (kind in (*READABLE, *UNREADABLE, *SILENT) or kind.endswith((CALL, RESULT))):
        raise PydanticCustomError(SAID, "has a block of type {kind}, which is not known here", {"kind": kind[:40]})
    return kind


class TextBlock(Body):
    type: Literal["text"]
    text: str


class OtherBlock(Body):
    """Which fields it has depends on its type."""

    type: Annotated[ShortText, AfterValidator(_known)]
    source: Any = None
    title: str = ""
    context: str = ""
    url: str = ""
    content: Any = None
    id: str = ""
    name: str = ""
    input: Any = None
    tool_name: str = ""
    tool_use_id: str = ""

    @property
    def is_readable(self) -> bool:
        return self.type not in UNREADABLE and not (self.type == "document" and self._document is None)

    @property
    def text(self) -> str:
        """What it says; of what cannot be read, that it cannot be."""
        if not self.is_readable:
            return in_place_of(self.type)
        parts: list[Any]
        match self.type:
            case "tool_reference":
                parts = [self.tool_name]
            case "document":
                parts = [self.title, self.context, self._document]
            case "search_result":
                parts = [self.title, self.source, text_of(self.content)]
            case "web_search_result":
                parts = [self.title, self.url]
            case _:
                parts = [text_of(self.content)]
        return "\n".join(part for part in parts if isinstance(part, str) and part)

    @property
    def _document(self) -> str | None:
        """The text of its source; None where it has none, as a PDF."""
        source = self.source if isinstance(self.source, dict) else {}
        if source.get("type") == "text" and isinstance(source.get("data"), str):
            data: str = source["data"]
            return data
        return text_of(source.get("content")) if source.get("type") == "content" else None


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: ShortText
    input: Json = {}


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock | OtherBlock] = ""
    is_error: bool = False

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(block.text for block in self.content)


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock | OtherBlock,
    described("a block of text, thinking, tool_use, tool_result, or another that this model can read"),
]
Text = Annotated[str | list[TextBlock], described("a string or a list of text blocks")]
Blocks = Annotated[str | list[Block], described("a string or a list of blocks")]


def text_of(content: Any) -> str:
    """The text of what a server's tool found, which has many forms: blocks as what they say, the rest as JSON."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return "\n".join(map(text_of, content))
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind in (*READABLE, *UNREADABLE):
            return OtherBlock.model_construct(**content).text
    return json.dumps(content, ensure_ascii=False)
