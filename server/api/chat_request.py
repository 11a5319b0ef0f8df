"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scheduler.core.request import InvalidRequestError
from scheduler.sampling_params import SamplingParams
from server.api.ask import MAX_TOOLS, ROLES, Ask, AskedTool, Calling, call_for_template, thinking_variables
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
from server.api.unread import check_question, in_place_of

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


class ToolCall(Body):
    id: str = ""
    type: Literal["function", "custom"] = "function"
    function: FunctionCall


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
            message["tool_calls"] = [
                call_for_template(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
        if self.is_error:
            message["is_error"] = True
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


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
    def asked(self) -> AskedTool:
        function, is_custom = self.function, self.type == "custom"
        parameters = INPUT if is_custom else function.parameters
        return AskedTool(function.name, parameters, function.strict, function.description, is_custom)


class NameOfTool(CheckedBody):
    name: str


class NamedTool(CheckedBody):
    type: Literal["function", "custom"] = "function"
    function: NameOfTool


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
    def can_be_held(self) -> bool:
        return super().can_be_held and not self.use_beam_search

    def ask(self) -> Ask:
        """Raises `InvalidRequestError` for what cannot be read, and for a choice of tools that there are not."""
        check_question(enumerate(self.messages), "messages")
        return Ask(
            self,
            [message.for_template() for message in self.messages],
            self._calling(),
            variables=thinking_variables(self.reasoning_effort, self.verbosity)
            | ({"documents": self.documents} if self.documents else {})
            | self.chat_template_kwargs,
            template=self.chat_template,
            begins_turn=self.add_generation_prompt,
            goes_on=self.continue_final_message,
            prediction="" if self.prediction is None else self.prediction.text,
        )

    def _calling(self) -> Calling:
        calling = partial(Calling, [tool.asked for tool in self.tools], is_parallel=self.parallel_tool_calls)
        match self.tool_choice:
            case NamedTool(function=NameOfTool(name=name)):
                return calling(named=name)
            case ToolSubset(allowed_tools=AllowedTools(mode=mode, tools=tools)):
                return calling(mode=mode, among=[tool.function.name for tool in tools])
            case mode:
                return calling(mode=mode)
