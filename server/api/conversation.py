"""What the endpoints for conversations share: from messages and tools to a prompt, and from an answer's text to
what it says, thinks and calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from aiohttp import web

from scheduler.client.beam_search import BeamOptions
from scheduler.client.stream import with_phrases
from scheduler.core.request import InvalidRequestError
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer
from server.api.ask import Ask, Calling, Json
from server.api.generation import Asked, truncated
from server.api.models import longest_sequence, served_model
from server.api.requests import SampledRequest
from server.api.structured import Form
from server.api.wording import Wording
from server.app_keys import CONFIG, ENGINE
from server.config import ServeConfig
from server.parsing.call_grammar import call_grammar, can_hold, held_grammar, written_format
from server.parsing.custom_input import CustomCalls
from server.parsing.events import FirstCall, Parser
from server.parsing.formats import (
    REASONING_MARKS,
    call_format_of,
    has_begun,
    marks,
    parser_of,
    reasoning_end,
    reasoning_of,
)
from server.parsing.template_parser import TemplateParser, TransformersParser

TURN = 64
"""The last tokens of a prompt, with what opens the assistant's turn among them."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request that is understood."""

    body: SampledRequest
    model: str
    """The name that it is answered by."""
    prompt: list[int]
    params: SamplingParams
    form: Form | None
    """What the answer is held to."""
    new_parser: Callable[[], Parser]
    """For each of its answers."""
    custom_tools: frozenset[str]
    """The names of those whose input is a text."""
    prediction: list[int]
    """Tokens that the client expects in them."""

    def asked(self, wording: Wording, beams: BeamOptions | None = None) -> Asked:
        return Asked(self.body, [self.prompt], self.params, wording, self.form, beams, self.prediction)


def understand(app: web.Application, ask: Ask) -> Conversation:
    """Raises whatever is wrong with the request. May be called in a thread."""
    config, tokenizer, info = app[CONFIG], app[ENGINE].tokenizer, app[ENGINE].info
    body, calling, longest = ask.body, ask.calling, longest_sequence(info)
    model = served_model(app, body.model)
    if ask.template is not None and not config.trust_request_chat_template:
        raise InvalidRequestError(
            "chat_template is a program: the server runs its own only, unless it is started with "
            "--trust-request-chat-template",
            "chat_template",
        )
    params = with_phrases(body.sampling_params(info.sampling_defaults, config.max_logprobs), tokenizer)
    template = ask.template or tokenizer.chat_template.source
    tools = [tool.for_template() for tool in calling.usable]
    prompt = tokenizer.apply_chat_template(
        _told_of(tools, ask.messages) if tools and "tools" not in template else ask.messages,
        longest=longest,
        cut=bool(body.truncate_prompt_tokens),
        add_special_tokens=bool(body.add_special_tokens),
        tools=tools,
        template=ask.template,
        add_generation_prompt=ask.begins_turn,
        continue_final_message=ask.goes_on,
        variables=ask.variables,
    )
    prompt = truncated(body, prompt, longest - (params.max_tokens or 1))
    reading = _reading(config, tokenizer, template, ask, prompt, tools)
    form = body.form()
    if calling.must_call:
        form = _form_of_calls(tokenizer, calling, reading, form)
    elif form is None and reading.held:
        form = _form_of_held_calls(tokenizer, calling, reading)
    if form is not None:
        form = reading.after_reasoning(form, tokenizer)
        params = msgspec.structs.replace(params, grammar=form.grammar)
    if reading.by_template is not None or reading.marks & tokenizer.control_tokens().keys():
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    predicted = _predicted(ask.prediction, tokenizer, longest)
    return Conversation(body, model, prompt, params, form, reading.new_parser, calling.custom, predicted)


def _predicted(text: str, tokenizer: Tokenizer, longest: int) -> list[int]:
    try:
        return tokenizer.encode(text, False, longest=longest) if text else []
    except InvalidRequestError as error:
        raise InvalidRequestError("the prediction is longer than any answer can be", "prediction") from error


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class _Reading:
    """How an answer's text is read."""

    call_format: str | None
    reasoning: str | None
    is_thinking: bool
    """The prompt has opened the reasoning."""
    tools: tuple[str, ...]
    custom_tools: frozenset[str]
    by_template: Callable[[], TransformersParser] | None
    """What else reads it, where neither format is known."""
    held: bool
    """Whether a grammar holds calls to their form where the model may also make none."""
    one_call: bool
    """Whether the answer has one at most."""

    @property
    def marks(self) -> frozenset[str]:
        return marks(self.call_format, self.reasoning)

    def after_reasoning(self, form: Form, tokenizer: Tokenizer) -> Form:
        """What the model thinks first is not held to the form of its answer."""
        if self.reasoning is None or not self.is_thinking:
            return form
        after = reasoning_end(self.reasoning, tokenizer.control_tokens())
        return form._replace(grammar=msgspec.structs.replace(form.grammar, after=after))

    def new_parser(self) -> Parser:
        parser: Parser
        if self.by_template is not None:
            parser = TemplateParser(self.by_template())
        else:
            parser = parser_of(
                self.call_format,
                self.tools,
                reasoning=self.reasoning,
                is_thinking=self.is_thinking,
                held=self.held,
            )
        if self.one_call:
            parser = FirstCall(parser)
        return CustomCalls(parser, self.custom_tools) if self.custom_tools else parser


def _reading(
    config: ServeConfig, tokenizer: Tokenizer, template: str, ask: Ask, prompt: list[int], tools: list[Json]
) -> _Reading:
    calling = ask.calling
    call_format = None
    if tools:
        call_format = config.tool_call_parser or call_format_of(template)
        if calling.must_call:
            call_format = written_format(call_format)
    reasoning = config.reasoning_parser or reasoning_of(template)
    is_thinking = False
    if reasoning is not None:
        is_thinking = has_begun(tokenizer.decode(prompt[-16:], skip_special_tokens=False), reasoning)
    by_template = None
    if tokenizer.has_response_template and call_format is None and (tools or reasoning is None):
        by_template = partial(tokenizer.response_parser, prompt[-TURN:], tools)
    is_one_held = not calling.is_parallel and ask.body.can_be_held
    may_call = bool(tools) and not calling.must_call
    return _Reading(
        call_format,
        reasoning,
        is_thinking,
        tuple(tool.name for tool in calling.to_call),
        calling.custom,
        by_template,
        held=may_call and (calling.needs_schemas or is_one_held) and can_hold(call_format),
        one_call=not calling.is_parallel,
    )


def _form_of_calls(tokenizer: Tokenizer, calling: Calling, reading: _Reading, form: Form | None) -> Form:
    if form is not None:
        raise InvalidRequestError(
            f"tool_choice and {form.field} both say what the answer looks like", "tool_choice"
        )
    assert reading.call_format is not None
    grammar = call_grammar(
        reading.call_format,
        calling.to_call,
        several=calling.is_parallel and calling.named is None,
        control_tokens=tokenizer.control_tokens(),
    )
    return Form(grammar, "tools")


def _form_of_held_calls(tokenizer: Tokenizer, calling: Calling, reading: _Reading) -> Form:
    assert reading.call_format is not None
    marks = None if reading.is_thinking or reading.reasoning is None else REASONING_MARKS[reading.reasoning]
    grammar = held_grammar(
        reading.call_format,
        calling.to_call,
        several=calling.is_parallel,
        control_tokens=tokenizer.control_tokens(),
        reasoning=marks,
    )
    return Form(grammar, "tools", is_needed=calling.needs_schemas)


def _told_of(tools: Sequence[Json], messages: Sequence[Json]) -> list[Json]:
    """For templates that do not know of tools."""
    said = "You can call these functions:\n" + "\n".join(json.dumps(tool["function"]) for tool in tools)
    if messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{said}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]
