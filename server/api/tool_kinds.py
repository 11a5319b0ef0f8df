"""Tools that are no functions. A custom tool, whose input is one text, is served as a function of one string;
those that a hosted API runs itself (`web_search`, `mcp`, ...) are left out, since nobody here would."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Field

from server.once import Once

Json = dict[str, Any]

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]

SERVED = ("function", "custom")
INPUT: Json = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""The parameters of a custom tool."""

NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function that is defined without any: it is called with {}."""

logger = logging.getLogger(__name__)
_told = Once(100)
"""Kinds that the log knows of."""


def without_hosted(tools: Any, served: tuple[str, ...] = SERVED) -> Any:
    """A request's list of tools, if it is one, without those of other kinds. What is nearly the name of a kind
    that is served stays, to be refused."""
    if not isinstance(tools, list):
        return tools
    kept = []
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str) or kind in served or get_close_matches(kind, served, 1, 0.65):
            kept.append(tool)
        elif _told.is_new(kind[:64]):
            logger.warning("tools of the kind %r are run by hosted APIs and left out here", kind[:64])
    return kept


def as_function(value: Any) -> Any:
    """A custom tool, the choice of one or a call of one, as chat completions have them, in the words for
    functions."""
    if not isinstance(value, dict) or value.get("type") != "custom" or not isinstance(value.get("custom"), dict):
        return value
    custom: Json = value["custom"]
    function: Json = {name: custom[name] for name in ("name", "description") if name in custom}
    if "input" in custom:
        function["arguments"] = {"input": custom["input"]}
    if (told := told_of_format(custom.get("format"))) is not None:
        function["description"] = "\n\n".join(filter(None, (function.get("description"), told)))
    return {**{name: value[name] for name in value if name != "custom"}, "function": function}


def told_of_format(wanted: Any) -> str | None:
    """For the model: what its input has to look like. The endpoints nest this differently."""
    if not isinstance(wanted, dict) or wanted.get("type") != "grammar":
        return None
    grammar = wanted.get("grammar", wanted)
    if not isinstance(grammar, dict) or not isinstance(grammar.get("definition"), str):
        return None
    return f"The input follows this {grammar.get('syntax', 'lark')} grammar:\n{grammar['definition']}"
