"""An answer that has to call a tool does, whatever the model would rather say, and its parser finds the calls."""

from __future__ import annotations

import json
import random

import jsonschema
import msgspec
import pytest

from scheduler.core.request import InvalidRequestError
from scheduler.text.grammar import GrammarCompiler
from scheduler.text.tokenizer import Tokenizer
from server.parsing.call_grammar import Tool, call_grammar, written_format
from server.parsing.events import Arguments, CallBegun, Event, Reasoning, merged
from server.parsing.formats import CALL_FORMATS, parser_of, reasoning_end
from tests.scheduler.grammar_walks import ENDS, allowed, walk

TOOLS = [
    Tool(
        "get_weather",
        {
            "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
    Tool(
        "add",
        {
            "type": "object",
            "$defs": {"number": {"type": "integer", "minimum": 0, "maximum": 99}},
            "properties": {"a": {"$ref": "#/$defs/number"}, "b": {"$ref": "#/$defs/number"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    ),
    Tool("now", {"properties": {}, "additionalProperties": False}),
]


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.definition(), ENDS)


def read(text: str, call_format: str, **options: bool | str) -> list[Event]:
    parser = parser_of(call_format, [tool.name for tool in TOOLS], **options)  # type: ignore[arg-type]
    return merged([*parser.push(text), *parser.finish()])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("call_format", sorted({written_format(name) for name in CALL_FORMATS}))
def test_whatever_is_drawn_is_calls(
    tokenizer: Tokenizer, compiler: GrammarCompiler, call_format: str, several: bool
) -> None:
    spec = call_grammar(call_format, TOOLS, several=several, control_tokens=tokenizer.control_tokens())
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    most = 0
    for seed in range(6):
        tokens = walk(compiler.compile(spec).matcher(), tokenizer, random.Random(seed), longest=400)
        if tokens is None:
            continue
        events = read(tokenizer.decode(tokens), call_format)
        names = [event.name for event in events if isinstance(event, CallBegun)]
        arguments = [event.text for event in events if isinstance(event, Arguments)]
        assert len(names) == len(arguments) == len(events) / 2, "calls, and nothing else"
        for name, text in zip(names, arguments, strict=True):
            jsonschema.validate(json.loads(text), {"type": "object", **schemas[name]})
        most = max(most, len(names))
    assert most > 1 if several else most == 1


@pytest.mark.parametrize("call_format", sorted({written_format(name) for name in CALL_FORMATS}))
def test_a_tool_may_be_called_anything(tokenizer: Tokenizer, compiler: GrammarCompiler, call_format: str) -> None:
    tool = Tool("RENAME_FILE", {"properties": {}, "additionalProperties": False})
    spec = call_grammar(call_format, [tool], several=False, control_tokens=tokenizer.control_tokens())
    tokens = walk(compiler.compile(spec).matcher(), tokenizer, random.Random(1), longest=400)
    assert tokens is not None
    parser = parser_of(call_format, [tool.name])
    events = [*parser.push(tokenizer.decode(tokens)), *parser.finish()]
    assert [event.name for event in events if isinstance(event, CallBegun)] == ["RENAME_FILE"]


def test_the_marks_are_the_tokens_that_the_model_knows(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    control_tokens = tokenizer.control_tokens()
    assert control_tokens["<|im_start|>"] == 1
    stand_in = {"<tool_call>": 1, "</tool_call>": 16}
    spec = call_grammar("hermes", TOOLS, several=False, control_tokens=stand_in)
    matcher = compiler.compile(spec).matcher()
    assert allowed(matcher) == [1]
    tokens = walk(matcher, tokenizer, random.Random(0))
    assert tokens is not None
    assert (tokens[0], tokens[-1]) == (1, 16)


def test_reasoning_may_come_first(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    spec = call_grammar("hermes", TOOLS, several=False, control_tokens={})
    matcher = compiler.compile(msgspec.structs.replace(spec, after=reasoning_end("qwen3", {}))).matcher()
    text = "I should <tool_call> the weather.\n</think>\n\n"
    matcher.advance(tokenizer.encode(text))
    rest = walk(matcher, tokenizer, random.Random(2))
    assert rest is not None
    thought, begun, _ = read(text + tokenizer.decode(rest), "hermes", reasoning="think", is_thinking=True)
    assert thought == Reasoning("I should <tool_call> the weather.")
    assert isinstance(begun, CallBegun)


def test_a_strict_tool_is_enforced_or_refused(compiler: GrammarCompiler) -> None:
    parameters = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    for strict in (False, True):
        spec = call_grammar("json", [Tool("f", parameters, strict)], several=False, control_tokens={})
        if strict:
            with pytest.raises(InvalidRequestError, match="uniqueItems"):
                compiler.compile(spec)
        else:
            compiler.compile(spec)
