"""The body of POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scheduler.core.request import InvalidRequestError
from scheduler.sampling_params import SamplingParams
from server.api.fields import (
    LIST,
    OBJECT,
    TEXT,
    TEXT_OR_LIST,
    Body,
    CheckedBody,
    Hint,
    Length,
    ShortText,
    described,
    only,
)
from server.api.requests import GenerationRequest
from server.api.synonyms import THINKING, thinking_in_our_words
from server.api.tool_kinds import INPUT, NO_PARAMETERS, ToolName, as_function, without_hosted
from server.api.unread import in_place_of
from server.parsing.call_grammar import Tool

CONTENT = "a string or a list of text parts"

Json = dict[str, Any]


TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class Part(Body):
    """Of a message. Other keys are hints for other servers, like `cache_control`, or what is no text."""

    type: ShortText
    text: Annotated[str, TEXT] = ""
    refusal: str = ""

    @property
    def is_text(self) -> bool:
        return self.type in TEXT_PARTS

    @property
    def said(self) -> str:
        return self.text or self.refusal if self.is_text else in_place_of(self.type)


Content = Annotated[str | list[str | Part], described(CONTENT)]


def _text_of(content: str | list[str | Part]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.said for part in content)


def _unread(content: str | list[str | Part]) -> str | None:
    parts = [] if isinstance(content, str) else content
    return next((part.type for part in parts if isinstance(part, Part) and not part.is_text), None)


class Prediction(CheckedBody):
    """What the answer will be for the most part: where it is, the answer takes fewer steps."""

    type: Literal["content"] = "content"
    content: Content = ""

    @property
    def text(self) -> str:
        return _text_of(self.content)


class FunctionCall(Body):
    name: ShortText
    arguments: str | Json = {}

    def parsed(self) -> Any:
        """The arguments as templates expect them: an object, where they are one."""
        if not isinstance(self.arguments, str):
            return self.arguments
        try:
            return json.loads(self.arguments) if self.arguments.strip() else {}
        except (json.JSONDecodeError, RecursionError):
            return self.arguments


class ToolCall(Body):
    id: str = ""
    type: Literal["function", "custom"] = "function"
    function: FunctionCall

    def for_template(self) -> Json:
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body):
    """One turn of a conversation. An assistant's turn may be sent back just as it was received, and programs put
    keys of their own into messages: what is not known is not looked at."""

    role: ShortText
    content: Annotated[Content, TEXT_OR_LIST] = ""
    name: str | None = None
    reasoning: Annotated[str, TEXT] = ""
    reasoning_content: Annotated[str, TEXT] = ""
    tool_call_id: str | None = None
    is_error: bool = False
    """Of a tool's result, for templates that know of it."""
    tool_calls: Annotated[list[Annotated[ToolCall, BeforeValidator(as_function)]], LIST] = []

    @property
    def text(self) -> str:
        return _text_of(self.content)

    @property
    def unread(self) -> str | None:
        return _unread(self.content)

    def for_template(self) -> Json:
        """As chat templates know it: text in one piece, and roles by their older names."""
        message: Json = {"role": ROLES.get(self.role, self.role), "content": self.text}
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.is_error:
            message["is_error"] = True
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


ROLES = {"developer": "system", "function": "tool"}


class FunctionDefinition(Body):
    """What a model may call."""

    name: ToolName
    description: str = ""
    parameters: Json = NO_PARAMETERS
    strict: bool = False


class ToolDefinition(Body):
    type: Literal["function", "custom"] = "function"
    function: FunctionDefinition

    @property
    def parameters(self) -> Json:
        return INPUT if self.type == "custom" else self.function.parameters

    def for_template(self) -> Json:
        """As templates know it, whatever it is."""
        function: Json = {"name": self.function.name}
        if self.function.description:
            function["description"] = self.function.description
        function["parameters"] = self.parameters
        if self.function.strict:
            function["strict"] = True
        return {"type": "function", "function": function}


class NameOfTool(CheckedBody):
    name: str


class NamedTool(CheckedBody):
    type: Literal["function", "custom"] = "function"
    function: NameOfTool


MAX_TOOLS = 256


class AllowedTools(CheckedBody):
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedTool, BeforeValidator(as_function)]],
        BeforeValidator(without_hosted),
        Field(min_length=1, max_length=MAX_TOOLS),
    ]


class ToolSubset(CheckedBody):
    """Some of the tools, as if there were no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(GenerationRequest):
    synonyms: ClassVar[dict[str, str]] = GenerationRequest.synonyms | THINKING

    messages: Annotated[list[Message], LIST, Field(min_length=1, fail_fast=True)]
    """The conversation so far."""
    logprobs: bool = False
    """With the log-probability of each token."""
    max_completion_tokens: Length | None = None
    """Tokens that the answer may have; -1 is as many as there is room for."""
    max_tokens: Length | None = None
    """The older name of max_completion_tokens."""
    top_logprobs: Length | None = None
    """With the logprobs of so many likeliest tokens in the place of each; -1 is as many as the server allows
    (`--max-logprobs`)."""
    prediction: Annotated[Prediction | None, OBJECT] = None
    """What the answer will be for the most part: it comes in fewer steps, and is the same."""
    reasoning_effort: ReasoningEffort | None = None
    """For templates of models that think; `none` turns thinking off."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """For templates that know of it."""

    tools: Annotated[
        list[Annotated[ToolDefinition, BeforeValidator(as_function)]],
        BeforeValidator(without_hosted),
        Field(max_length=MAX_TOOLS),
        LIST,
    ] = []
    """What the model may call."""
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | Annotated[NamedTool, BeforeValidator(as_function)] | ToolSubset,
        described("none, auto, required, a function's name, or allowed_tools"),
    ] = "auto"
    """Whether it has to, and what."""
    parallel_tool_calls: bool = True
    """Whether an answer may have more than one call."""

    # Beyond OpenAI's API, named as in other servers.
    add_generation_prompt: bool = True
    """The template begins the assistant's turn."""
    chat_template: str | None = None
    """A template of the request's own (--trust-request-chat-template)."""
    chat_template_kwargs: Json = {}
    """More variables of the template."""
    continue_final_message: bool = False
    """The last message is not ended: the answer goes on with it."""
    documents: list[Json] = []
    """For templates that know of them."""
    echo: bool = False
    """The answer begins with the message that it goes on with."""
    include_reasoning: bool = True
    """Whether the answer has what the model thought."""

    # These change nothing in the answer.
    store: Hint[bool] = False

    # Not implemented.
    audio: Annotated[Any, only()] = None
    best_of: Annotated[Any, only(1)] = 1
    function_call: Annotated[Any, only("none", "auto")] = "none"
    functions: Annotated[Any, only([])] = []
    modalities: Annotated[Any, only(["text"])] = ["text"]
    moderation: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None

    @classmethod
    def _translated(cls, values: Json) -> Json:
        return thinking_in_our_words(super()._translated(values), cls.model_fields)

    def sampling_params(self, defaults: Mapping[str, float], max_logprobs: int) -> SamplingParams:
        """Raises `InvalidRequestError` for what the fields, each right by itself, do not make together."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens not in (None, max_tokens):
            raise InvalidRequestError(
                "max_tokens is the older name of max_completion_tokens: give one of them", "max_tokens"
            )
        wants_both = self.continue_final_message and self.add_generation_prompt
        if wants_both and "add_generation_prompt" in self.model_fields_set:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt: false", "continue_final_message"
            )
        return self._sampling_params(
            defaults,
            max_logprobs,
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            field="top_logprobs",
        )

    @property
    def named_tool(self) -> str | None:
        """The one that has to be called. Raises `InvalidRequestError` if there is no such tool."""
        return self._known(self.tool_choice) if isinstance(self.tool_choice, NamedTool) else None

    def _known(self, tool: NamedTool) -> str:
        """The name of a tool that there is. Raises `InvalidRequestError`."""
        name = tool.function.name
        if all(tool.function.name != name for tool in self.tools):
            raise InvalidRequestError(
                f"tool_choice names {name[:100]!r}, which is none of the tools", "tool_choice"
            )
        return name

    @property
    def _allowed(self) -> list[ToolDefinition]:
        """The tools that may be called."""
        if not isinstance(self.tool_choice, ToolSubset):
            return self.tools
        names = {self._known(tool) for tool in self.tool_choice.allowed_tools.tools}
        return [tool for tool in self.tools if tool.function.name in names]

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be calls. Raises `InvalidRequestError` if there is nothing to call."""
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, ToolSubset) else choice
        is_needed = mode == "required" or self.named_tool is not None
        if is_needed and not self.tools:
            raise InvalidRequestError("tool_choice needs tools", "tool_choice")
        return is_needed

    @property
    def holds_calls(self) -> bool:
        """Whether what begins as a call, where none has to, is to be held to its form."""
        return bool(self.usable_tools) and (self.needs_schemas or self._needs_one_call)

    @property
    def needs_schemas(self) -> bool:
        """Whether an answer that cannot be held to its tools' schemas would not do."""
        return any(tool.function.strict for tool in self._allowed)

    @property
    def _needs_one_call(self) -> bool:
        return not (self.parallel_tool_calls or self.use_beam_search or self.allowed_token_ids)

    @property
    def usable_tools(self) -> list[Json]:
        """As templates know them; none where none is to be called."""
        if self.tool_choice == "none":
            return []
        return [tool.for_template() for tool in self._allowed]

    @property
    def custom_tools(self) -> frozenset[str]:
        """The names of those whose input is a text."""
        return frozenset(tool.function.name for tool in self.tools if tool.type == "custom")

    @property
    def tools_to_call(self) -> list[Tool]:
        """Those that the answer has to choose from."""
        named = self.named_tool
        return [
            Tool(tool.function.name, tool.parameters, tool.function.strict)
            for tool in self._allowed
            if named in (None, tool.function.name)
        ]

    @property
    def template_variables(self) -> Json:
        """For the chat template, besides the messages."""
        variables: Json = {}
        if self.reasoning_effort is not None:
            variables |= {
                "reasoning_effort": self.reasoning_effort,
                "enable_thinking": self.reasoning_effort != "none",
                "thinking": self.reasoning_effort != "none",
            }
        if self.verbosity is not None:
            variables["verbosity"] = self.verbosity
        if self.documents:
            variables["documents"] = self.documents
        return variables | self.chat_template_kwargs
