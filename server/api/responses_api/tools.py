"""The tools of POST /v1/responses: functions, custom tools, and namespaces of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.api.ask import AskedTool
from server.api.fields import Body
from server.api.tool_kinds import INPUT, NO_PARAMETERS, SERVED, ToolName, told_of_format, without_hosted

Json = dict[str, Any]


def _with_namespaces(tools: Any) -> Any:
    return without_hosted(tools, (*SERVED, "namespace"))


class OneTool(Body):
    """A function, or a custom tool."""

    type: Literal["function", "custom"] = "function"
    name: ToolName
    description: str = ""
    parameters: Json = NO_PARAMETERS
    """Of a function."""
    strict: bool = False
    format: Json = {}
    """Of a custom tool's input."""

    @property
    def told(self) -> Json:
        """As the response says it again."""
        own = ("parameters", "strict") if self.type == "function" else ("format",) if self.format else ()
        return {name: getattr(self, name) for name in ("type", "name", "description", *own)}


class ResponseTool(OneTool):
    """Or a namespace, in which there are some."""

    type: Literal["function", "custom", "namespace"] = "function"  # type: ignore[assignment]
    tools: Annotated[list[OneTool], BeforeValidator(without_hosted), Field(max_length=256)] = []

    @property
    def told(self) -> Json:
        own = {"tools": [tool.told for tool in self.tools]} if self.type == "namespace" else {}
        return super().told | own

    def each(self) -> Iterator[FlatTool]:
        if self.type != "namespace":
            yield FlatTool(self, "")
            return
        for place, tool in enumerate(self.tools):
            yield FlatTool(tool, self.name, self.description if place == 0 else "")


Tools = Annotated[list[ResponseTool], BeforeValidator(_with_namespaces), Field(max_length=256)]


class FlatTool:
    """A tool as the model knows it. `introduction`: what is said of its namespace."""

    def __init__(self, tool: OneTool, namespace: str, introduction: str = "") -> None:
        self.type = tool.type
        self.name = tool.name
        self.namespace = namespace
        self._tool = tool
        self._introduction = introduction

    @property
    def asked(self) -> AskedTool:
        tool, name, is_custom = self._tool, flat_name(self.namespace, self.name), self.type == "custom"
        said = [self._introduction, tool.description, (told_of_format(tool.format) or "") if is_custom else ""]
        description = "\n\n".join(filter(None, said))
        if is_custom:
            return AskedTool(name, INPUT, description=description, is_custom=True)
        return AskedTool(name, tool.parameters, tool.strict, description)


def flat_name(namespace: str, name: str) -> str:
    """What the model calls a tool of a namespace: as clients of the Model Context Protocol do
    (`mcp__server__tool`)."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"
