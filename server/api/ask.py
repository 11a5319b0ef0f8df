"""What a conversation comes to, whatever the dialect: turns as chat templates know them, and tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from scheduler.core.request import InvalidRequestError
from server.api.requests import SampledRequest
from server.parsing.call_grammar import Tool

Json = dict[str, Any]

MAX_TOOLS = 256

ROLES = {"developer": "system", "function": "tool"}
"""The names that templates know, of roles that have newer or older ones."""


class AskedTool(Tool, frozen=True):
    """A tool as templates are told of it, whatever it is."""

    description: str = ""
    is_custom: bool = False
    """Whether its input is a text, and not an object."""

    def for_template(self) -> Json:
        function: Json = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = self.parameters
        if self.strict:
            function["strict"] = True
        return {"type": "function", "function": function}


Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Calling:
    """Which tools an answer may call, or has to. Raises `InvalidRequestError` where there is no such tool."""

    tools: Sequence[AskedTool] = ()
    mode: Mode = "auto"
    among: Sequence[str] | None = None
    """The names of some of the tools, as if there were no others."""
    named: str | None = None
    """The one that has to be called."""
    is_parallel: bool = True
    """Whether an answer may have more than one call."""

    def __post_init__(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise InvalidRequestError(f"there are {len(self.tools)} tools, and {MAX_TOOLS} are the most", "tools")
        names = {tool.name for tool in self.tools}
        for name in (*(self.among or ()), *([] if self.named is None else [self.named])):
            if name not in names:
                raise InvalidRequestError(
                    f"tool_choice names {name[:100]!r}, which is none of the tools", "tool_choice"
                )
        if self.must_call and not self.tools:
            raise InvalidRequestError("tool_choice needs tools", "tool_choice")

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be calls."""
        return self.mode == "required" or self.named is not None

    @cached_property
    def usable(self) -> list[AskedTool]:
        """What the model is told of."""
        if self.mode == "none":
            return []
        return [tool for tool in self.tools if self.among is None or tool.name in self.among]

    @property
    def to_call(self) -> list[AskedTool]:
        """Those that a call chooses from."""
        return [tool for tool in self.usable if self.named in (None, tool.name)]

    @property
    def needs_schemas(self) -> bool:
        """Whether an answer that cannot be held to its tools' schemas would not do."""
        return any(tool.strict for tool in self.usable)

    @property
    def custom(self) -> frozenset[str]:
        """The names of the tools whose input is a text."""
        return frozenset(tool.name for tool in self.tools if tool.is_custom)


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation that is to go on."""

    body: SampledRequest
    """How it is drawn and served."""
    messages: Sequence[Json]
    """As chat templates know them: text in one piece, and arguments of calls as objects."""
    calling: Calling = field(default_factory=Calling)
    variables: Json = field(default_factory=dict)
    """More of the template's."""
    template: str | None = None
    """The request's own."""
    begins_turn: bool = True
    """The template begins the assistant's turn."""
    goes_on: bool = False
    """The last message is not ended: the answer goes on with it."""
    prediction: str = ""
    """What the client expects of the answer."""


def call_for_template(call_id: str, name: str, arguments: Any) -> Json:
    """A call of an earlier turn. Arguments that are a text become what it says, where it is JSON."""
    if isinstance(arguments, str):
        with suppress(json.JSONDecodeError, RecursionError):
            arguments = json.loads(arguments) if arguments.strip() else {}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def thinking_variables(effort: str | None, verbosity: str | None = None) -> Json:
    """For templates of models that think: by the names that their authors gave it."""
    variables: Json = {}
    if effort is not None:
        does_think = effort != "none"
        variables = {"reasoning_effort": effort, "enable_thinking": does_think, "thinking": does_think}
    if verbosity is not None:
        variables["verbosity"] = verbosity
    return variables
