"""The body of POST /v1/messages, and the conversation that it is."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scheduler.sampling_params import InvalidRequestError
from server.api.chat_request import ChatRequest
from server.api.fields import MAX_STOPS, Body, CheckedBody, ShortText, described, only
from server.api.requests import SampledRequest
from server.api.synonyms import THINKING, sampling_synonyms, thinking_in_our_words
from server.api.tool_kinds import ToolName, without_hosted

Json = dict[str, Any]


class TextBlock(Body):
    type: Literal["text"]
    text: str


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
    content: str | list[TextBlock] = ""
    is_error: bool = False


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock,
    described("a block of text, thinking, tool_use or tool_result: this model reads text only"),
]
Text = Annotated[str | list[TextBlock], described("a string or a list of text blocks")]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block] = ""


class ToolDefinition(Body):
    name: ToolName
    description: str = ""
    input_schema: Json = {}
    type: Literal["custom"] = "custom"
    strict: bool = False


def _own_tools(tools: Any) -> Any:
    """Without those that Anthropic's servers run, or that its models were taught."""
    return without_hosted(tools, ("custom",))


class ToolChoice(CheckedBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[Json, Field(alias="schema")]


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(CheckedBody):
    """The body of POST /v1/messages/count_tokens."""

    synonyms: ClassVar[dict[str, str]] = THINKING

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: Text = ""
    tools: Annotated[list[ToolDefinition], BeforeValidator(_own_tools), Field(max_length=256)] = []
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # These change nothing in the answer.
    betas: list[str] = []
    cache_control: Json = {}
    context_management: Json = {}

    # Beyond Anthropic's API, named as in other servers.
    chat_template_kwargs: Json = {}
    """More variables of the template."""

    @classmethod
    def _translated(cls, values: Json) -> Json:
        return thinking_in_our_words(super()._translated(values), cls.model_fields)

    def _conversation(self) -> Json:
        """The fields of a `ChatRequest`."""
        messages: list[Json] = []
        if system := _text(self.system):
            messages.append({"role": "system", "content": system})
        for turn in self.messages:
            messages += _messages(turn)
        fields: Json = {"model": self.model, "messages": messages, "tools": self._tools()}
        choice = self.tool_choice
        fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": "required"}[
            choice.type
        ]
        if choice.type == "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}}
        fields["chat_template_kwargs"] = self.chat_template_kwargs
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if self.thinking is not None:
            fields["reasoning_effort"] = "none" if self.thinking.type == "disabled" else "medium"
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "answer", "schema": self.output_config.format.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    def _tools(self) -> list[Json]:
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in self.tools
        ]

    def as_chat(self) -> ChatRequest:
        """Raises `pydantic.ValidationError`."""
        return ChatRequest.model_validate(self._conversation())


class MessagesRequest(CountRequest, SampledRequest):
    synonyms: ClassVar[dict[str, str]] = sampling_synonyms("max_tokens") | CountRequest.synonyms

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[ShortText], Field(max_length=MAX_STOPS)] = []
    stream: bool = False

    # These change nothing in the answer.
    metadata: Json = {}
    service_tier: Literal["auto", "standard_only"] = "auto"
    inference_geo: str = ""
    speed: str = ""

    # Not implemented.
    container: Annotated[Any, only()] = None
    mcp_servers: Annotated[Any, only([])] = []

    def as_chat(self) -> ChatRequest:
        fields = self.sampled | self._conversation() | {"max_tokens": self.max_tokens, "stream": self.stream}
        if self.stop_sequences:
            fields["stop"] = self.stop_sequences
        return ChatRequest.model_validate(fields)


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _messages(turn: Turn) -> list[Json]:
    """A turn in OpenAI's words: results of tools are messages of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    said: list[str] = []
    thought: list[str] = []
    calls: list[Json] = []
    results: list[Json] = []
    for block in turn.content:
        match block:
            case TextBlock():
                said.append(block.text)
            case ThinkingBlock():
                thought.append(block.thinking)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                content = _text(block.content)
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    if results and turn.role != "user":
        raise InvalidRequestError("tool_result blocks belong into user turns", "messages")
    message: Json = {"role": turn.role, "content": "\n".join(said)}
    if calls:
        message["tool_calls"] = calls
    if thought:
        message["reasoning_content"] = "\n".join(thought)
    return results + ([message] if said or calls or thought or not results else [])
