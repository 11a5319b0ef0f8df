"""The body of POST /v1/messages, and the conversation that it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.sampling_params import SamplingParams
from server.api.ask import MAX_TOOLS, Ask, AskedTool, Calling, Mode, call_for_template, thinking_variables
from server.api.fields import (
    LIST,
    MAX_STOPS,
    OBJECT,
    TEXT_OR_LIST,
    Body,
    CheckedBody,
    Hint,
    LengthAboveZero,
    ShortText,
    only,
)
from server.api.messages_api.blocks import (
    CALL,
    RESULT,
    SILENT,
    Blocks,
    OtherBlock,
    Text,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from server.api.requests import SampledRequest
from server.api.structured import Form
from server.api.synonyms import THINKING, sampling_synonyms, thinking_in_our_words
from server.api.tool_kinds import NO_PARAMETERS, ToolName, without_hosted
from server.api.unread import check_question

Json = dict[str, Any]
BILLING = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*")
"""What Claude Code begins its system prompt with. It differs between sessions, and with it before everything else
the prefix cache would find nothing."""


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: Blocks = ""

    @property
    def unread(self) -> str | None:
        """The type of a block in it that this model cannot read."""
        blocks = [] if isinstance(self.content, str) else self.content
        return next(
            (block.type for block in blocks if isinstance(block, OtherBlock) and not block.is_readable), None
        )


class ToolDefinition(Body):
    name: ToolName
    description: str = ""
    input_schema: Json = NO_PARAMETERS
    type: Literal["custom"] = "custom"
    strict: bool = False


def _own_tools(tools: Any) -> Any:
    """Without those that Anthropic's servers run, or that its models were taught."""
    return without_hosted(tools, ("custom",))


class ToolChoice(CheckedBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


_MODES: dict[str, Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


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
    """By default, and where the name is none at /v1/models, the model that is served (`--unknown-models`)."""
    messages: Annotated[list[Turn], LIST, Field(min_length=1, fail_fast=True)]
    """The conversation so far."""
    system: Annotated[Text, TEXT_OR_LIST] = ""
    """What comes before it."""
    tools: Annotated[list[ToolDefinition], LIST, BeforeValidator(_own_tools), Field(max_length=MAX_TOOLS)] = []
    """What the model may call."""
    tool_choice: ToolChoice = ToolChoice(type="auto")
    """Whether it has to, and what."""
    thinking: Thinking | None = None
    """For templates of models that think."""
    output_config: Annotated[OutputConfig | None, OBJECT] = None
    """The form of the answer, and how much is thought."""

    # These change nothing in the answer.
    betas: Hint[list[str]] = []
    cache_control: Hint[Json] = {}
    context_management: Hint[Json] = {}

    # Beyond Anthropic's API, named as in other servers.
    chat_template_kwargs: Json = {}
    """More variables of the template."""

    @classmethod
    def _translated(cls, values: Json) -> Json:
        return thinking_in_our_words(super()._translated(values), cls.model_fields)

    def ask(self) -> Ask:
        """Raises `InvalidRequestError`."""
        check_question(enumerate(self.messages), "messages")
        system = _system(self.system)
        messages = [{"role": "system", "content": system}] if system else []
        for turn in self.messages:
            messages += _messages(turn)
        last = messages[-1]
        goes_on = last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")
        return Ask(
            self._body(),
            messages,
            self._calling(),
            variables=thinking_variables(self._effort()) | self.chat_template_kwargs,
            begins_turn=not goes_on,
            goes_on=goes_on,
        )

    def _body(self) -> SampledRequest:
        """What the answer would be drawn by."""
        return SampledRequest(model=self.model)

    def _effort(self) -> str | None:
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        effort = None if self.output_config is None else self.output_config.effort
        return "medium" if effort is None and self.thinking is not None else effort

    def _calling(self) -> Calling:
        choice = self.tool_choice
        return Calling(
            [AskedTool(tool.name, tool.input_schema, tool.strict, tool.description) for tool in self.tools],
            _MODES[choice.type],
            named=(choice.name or "") if choice.type == "tool" else None,
            is_parallel=not choice.disable_parallel_tool_use,
        )


class MessagesRequest(CountRequest, SampledRequest):
    synonyms: ClassVar[dict[str, str]] = sampling_synonyms("max_tokens") | CountRequest.synonyms

    max_tokens: LengthAboveZero
    """Tokens that the answer may have; -1 is as many as there is room for."""
    stop_sequences: Annotated[list[ShortText], Field(max_length=MAX_STOPS)] = []
    """The answer ends before the first of these strings."""

    # These change nothing in the answer.
    metadata: Hint[Json] = {}
    service_tier: Hint[str] = ""
    inference_geo: Hint[str] = ""
    speed: Hint[str] = ""

    # Not implemented.
    container: Annotated[Any, only()] = None
    mcp_servers: Annotated[Any, only([])] = []

    def _body(self) -> SampledRequest:
        return self

    def sampling_params(self, defaults: Mapping[str, float], max_logprobs: int) -> SamplingParams:
        return self._sampling_params(defaults, max_logprobs, max_tokens=self.max_tokens)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop_sequences) or super().stops

    def _own(self) -> list[Form]:
        if self.output_config is None or (wanted := self.output_config.format) is None:
            return super()._own()
        spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema_), strict=True)
        return [*super()._own(), Form(spec, "output_config.format")]


def _system(content: str | list[TextBlock]) -> str:
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    return "\n".join(filter(None, (BILLING.sub("", text) for text in texts)))


def _messages(turn: Turn) -> list[Json]:
    """A turn as chat templates know it: results of tools are messages of their own."""
    if isinstance(turn.content, str):
        text = _system(turn.content) if turn.role == "system" else turn.content
        return [{"role": turn.role, "content": text}]
    messages = _Messages(turn.role)
    for block in turn.content:
        messages.add(block)
    return messages.all()


class _Messages:
    """Those that a turn becomes."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._done: list[Json] = []
        self._said: list[str] = []
        self._thought: list[str] = []
        self._calls: list[Json] = []

    def all(self) -> list[Json]:
        self._end()
        return self._done or [{"role": self._role, "content": ""}]

    def add(self, block: Any) -> None:
        match block:
            case TextBlock():
                self._said.append(BILLING.sub("", block.text) if self._role == "system" else block.text)
            case ThinkingBlock():
                self._thought.append(block.thinking)
            case ToolUseBlock():
                self._call(block.id, block.name, block.input)
            case ToolResultBlock():
                if self._role != "user":
                    raise InvalidRequestError("tool_result blocks belong into user turns", "messages")
                self._result(block.tool_use_id, block.text, is_error=block.is_error)
            case OtherBlock(type=kind) if kind in SILENT:
                pass
            case OtherBlock(type=kind) if kind.endswith(CALL):
                self._call(block.id, block.name or kind.removesuffix(CALL), block.input)
            case OtherBlock(type=kind) if kind.endswith(RESULT):
                self._end()  # a server's tools answer within the assistant's turn, which goes on behind it
                self._result(block.tool_use_id, block.text)
            case OtherBlock():
                self._said.append(block.text)

    def _call(self, call_id: str, name: str, given: Any) -> None:
        self._calls.append(call_for_template(call_id, name, given if isinstance(given, dict) else {}))

    def _result(self, call_id: str, text: str, *, is_error: bool = False) -> None:
        """Results come before what the user says beside them."""
        content = f"Error: {text}" if is_error and not text.lower().startswith("error") else text
        message = {"role": "tool", "content": content, "tool_call_id": call_id}
        self._done.append(message | {"is_error": True} if is_error else message)

    def _end(self) -> None:
        message: Json = {"role": self._role, "content": "\n".join(filter(None, self._said))}
        if self._thought:
            message["reasoning_content"] = "\n".join(self._thought)
        if self._calls:
            message["tool_calls"] = self._calls
        if self._said or self._calls or self._thought:
            self._done.append(message)
        self._said, self._thought, self._calls = [], [], []
