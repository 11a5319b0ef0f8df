"""The body of POST /v1/responses, and the conversation that it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.sampling_params import SamplingParams
from server.api.ask import ROLES, Ask, Calling, call_for_template, thinking_variables
from server.api.chat_request import ReasoningEffort
from server.api.fields import (
    LIST,
    OBJECT,
    TEXT,
    TEXT_OR_LIST,
    Body,
    CheckedBody,
    Count,
    Hint,
    Length,
    LengthAboveZero,
    ShortText,
    described,
    only,
)
from server.api.requests import SampledRequest
from server.api.responses_api.items import ToolItem, tool_messages
from server.api.responses_api.tools import FlatTool, Tools, flat_name
from server.api.structured import Form
from server.api.synonyms import THINKING, sampling_in_our_words, sampling_synonyms, thinking_in_our_words
from server.api.tool_kinds import without_hosted
from server.api.unread import check_question, in_place_of

Json = dict[str, Any]


TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


class Part(Body):
    type: ShortText
    text: str = ""
    refusal: str = ""


Parts = Annotated[str | list[Part], described("a string or a list of parts")]


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: ShortText
    content: Parts = ""

    @property
    def unread(self) -> str | None:
        """The type of a part in it that this model cannot read."""
        parts = [] if isinstance(self.content, str) else self.content
        return next((part.type for part in parts if part.type not in TEXT_PARTS), None)


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: ShortText
    namespace: ShortText = ""
    arguments: str = "{}"


class OutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts = ""


class ReasoningItem(Body):
    type: Literal["reasoning"]
    content: Parts = ""
    summary: Parts = ""


class ReferenceItem(Body):
    """An item of an earlier answer, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: ShortText


Item = Annotated[
    MessageItem | CallItem | OutputItem | ReasoningItem | ToolItem | ReferenceItem,
    described(
        "a message, function_call, function_call_output, reasoning item or item_reference, or a call or output of "
        "a tool"
    ),
]


class NamedFunction(CheckedBody):
    type: Literal["function", "custom"]
    name: str
    namespace: str = ""

    @property
    def flat(self) -> str:
        return flat_name(self.namespace, self.name)


class AllowedFunctions(CheckedBody):
    """Some of the tools, as if there were no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], BeforeValidator(without_hosted), Field(min_length=1, max_length=256)]


class TextFormat(CheckedBody):
    type: Literal["text", "json_object", "json_schema"]
    name: Hint[str] = ""
    description: Hint[str] = ""
    schema_: Annotated[Json, Field(alias="schema")] = {}
    strict: bool = False


class TextOptions(CheckedBody):
    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Body):
    effort: ReasoningEffort | None = None


class ResponsesRequest(SampledRequest):
    synonyms: ClassVar[dict[str, str]] = sampling_synonyms("max_output_tokens") | THINKING

    input: Annotated[
        str | Annotated[list[Item], Field(fail_fast=True)], described("a string or a list of items"), TEXT_OR_LIST
    ] = ""
    """A text, or the items of the conversation so far."""
    include: list[str] = []
    """Only `message.output_text.logprobs` is looked for."""
    instructions: Annotated[str, TEXT] = ""
    """What comes before it."""
    max_output_tokens: LengthAboveZero | None = None
    """Tokens that the answer may have; -1 is as many as there is room for."""
    parallel_tool_calls: bool = True
    """Whether an answer may have more than one call."""
    previous_response_id: str | None = None
    """The response that this one follows (--store)."""
    reasoning: ReasoningOptions = ReasoningOptions()
    """For templates of models that think."""
    store: bool | None = None
    """Keep the response (--store). false keeps nothing of it, not even for minutes."""
    text: Annotated[TextOptions, OBJECT] = TextOptions()
    """The form of the answer."""
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions,
        described("none, auto, required, a function, or allowed_tools"),
    ] = "auto"
    """Whether the model has to call something, and what."""
    tools: Annotated[Tools, LIST] = []
    """What the model may call."""
    top_logprobs: Length | None = None
    """With the logprobs of so many likeliest tokens in the place of each; -1 is as many as the server allows
    (`--max-logprobs`)."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """`auto` leaves out the oldest turns of a conversation that is too long."""

    # Beyond OpenAI's API, named as in other servers.
    chat_template_kwargs: Json = {}
    """More variables of the template."""

    # These change nothing in the answer.
    max_tool_calls: Hint[Count | None] = None
    """Of tools that a server runs itself: there are none here."""
    metadata: Json = {}
    """Is in the response again."""
    prompt_cache_key: Hint[str] = ""
    prompt_cache_options: Hint[Json] = {}
    prompt_cache_retention: Hint[str] = ""
    safety_identifier: Hint[str] = ""
    service_tier: Hint[str] = ""
    stream_options: Hint[Json] = {}

    # Not implemented.
    background: Annotated[Any, only(False)] = False
    context_management: Annotated[Any, only([])] = []
    conversation: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None

    @classmethod
    def _translated(cls, values: Json) -> Json:
        values = sampling_in_our_words(values, cls.model_fields, "max_output_tokens")
        return thinking_in_our_words(values, cls.model_fields)

    @property
    def referenced(self) -> list[str]:
        """The ids of the items that are only named."""
        items = [] if isinstance(self.input, str) else self.input
        return [item.id for item in items if isinstance(item, ReferenceItem)]

    def items(self, referenced: Mapping[str, Json]) -> list[Json]:
        """The input as items, which can be kept. `referenced`: those that are only named, by their ids."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [
            referenced[item.id] if isinstance(item, ReferenceItem) else item.model_dump() for item in self.input
        ]

    @cached_property
    def flat_tools(self) -> dict[str, FlatTool]:
        """The tools by the names that the model knows them by."""
        flat = (tool for each in self.tools for tool in each.each())
        return {tool.asked.name: tool for tool in flat}

    def ask(self, items: Sequence[Json]) -> Ask:
        """`items`: those of the responses that this one follows, and its own. Raises `InvalidRequestError`."""
        given = enumerate([] if isinstance(self.input, str) else self.input)
        check_question(((place, item) for place, item in given if isinstance(item, MessageItem)), "input")
        messages: list[Json] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += turns(items)
        if not messages:
            raise InvalidRequestError("input is empty", "input")
        thinking = thinking_variables(self.reasoning.effort, self.text.verbosity)
        return Ask(self, messages, self._calling(), variables=thinking | self.chat_template_kwargs)

    def _calling(self) -> Calling:
        tools = [tool.asked for tool in self.flat_tools.values()]
        calling = partial(Calling, tools, is_parallel=self.parallel_tool_calls)
        match self.tool_choice:
            case NamedFunction(flat=name):
                return calling(named=name)
            case AllowedFunctions(mode=mode, tools=among):
                return calling(mode=mode, among=[tool.flat for tool in among])
            case mode:
                return calling(mode=mode)

    def sampling_params(self, defaults: Mapping[str, float], max_logprobs: int) -> SamplingParams:
        does_score = self.top_logprobs is not None or "message.output_text.logprobs" in self.include
        return self._sampling_params(
            defaults,
            max_logprobs,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if does_score else None,
            field="top_logprobs",
        )

    def _own(self) -> list[Form]:
        wanted = self.text.format
        if wanted.type == "text":
            return super()._own()
        spec = GrammarSpec(GrammarKind.JSON_OBJECT)
        if wanted.type == "json_schema":
            spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema_), wanted.strict)
        return [*super()._own(), Form(spec, "text.format")]


def turns(items: Sequence[Json]) -> list[Json]:
    """Items as chat templates know them: calls and reasoning belong to the assistant's message that they are
    around."""
    messages: list[Json] = []

    def assistants() -> Json:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for item in items:
        match item.get("type", "message"):
            case "function_call":
                name = flat_name(item.get("namespace") or "", item["name"])
                call = call_for_template(item["call_id"], name, item["arguments"])
                assistants().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = {"role": "tool", "content": _text(item["output"]), "tool_call_id": item["call_id"]}
                messages.append(output)
            case "reasoning":
                messages.append({"role": "assistant", "content": "", "reasoning_content": _text(item["content"])})
            case kind if kind != "message":
                for what, said in tool_messages(item):
                    if what == "call":
                        assistants().setdefault("tool_calls", []).append(said)
                    else:
                        messages.append(said)
            case _ if item["role"] == "assistant":
                message = assistants()
                message["content"] += _text(item["content"])
            case _:
                role = ROLES.get(item["role"], item["role"])
                messages.append({"role": role, "content": _text(item["content"])})
    return messages


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(_text_of_part(part) for part in content)


def _text_of_part(part: Json) -> str:
    if part["type"] not in TEXT_PARTS:
        return in_place_of(part["type"])
    return part.get("text") or part.get("refusal") or ""
