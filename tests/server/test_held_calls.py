"""Where the model may call tools or not, what begins as a call goes on as one: random tools, and a model that
wants to write something else."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import pytest

from scheduler.text.grammar import GrammarCompiler, Matcher
from scheduler.text.tokenizer import Tokenizer
from server.parsing.call_grammar import Tool, can_hold, held_grammar
from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning, merged
from server.parsing.formats import CALL_FORMATS, REASONING_MARKS, parser_of
from tests.scheduler.grammar_walks import CLOSING, ENDS, filled
from tests.server.test_parsing import QWEN

FORMATS = sorted(filter(can_hold, CALL_FORMATS))
WORDS = ["get", "set", "read", "file", "weather", "search", "list", "note", "x", "city", "path", "limit"]
SAID = [
    "Sure. ",
    "Let me look.\n",
    "{",
    '{"a": 1} ',
    "x < y ",
    "naïve 🎠 ",
    "```json\n",
    "<think>",
    "\n\n",
    "[",
    '"name": ',
]
NAMES = ("get_weather", "mcp__files__read", "search.web", "a-b:c")


@dataclass
class Model:
    """What of one matters here."""

    tokenizer: Tokenizer
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        encode = self.tokenizer.encode
        self.compiler = GrammarCompiler(self.tokenizer.definition(), self.ends)
        self.closing = {ids[0] for text in CLOSING if len(ids := encode(text, add_special_tokens=False)) == 1}


@pytest.fixture(scope="module", params=["marks are text", "marks are tokens"])
def model(request: pytest.FixtureRequest, model_path: str) -> Model:
    if request.param == "marks are text":
        return Model(Tokenizer(model_path), ENDS)
    if not QWEN.is_dir():
        pytest.skip("Qwen2.5-Coder-0.5B-Instruct is not in the cache")
    tokenizer = Tokenizer(str(QWEN))
    assert "<tool_call>" in tokenizer.control_tokens()
    return Model(tokenizer, tuple(tokenizer.control_tokens()[name] for name in ("<|im_end|>", "<|endoftext|>")))


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "enum", "null"] + (["object", "array"] if depth else [])
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(WORDS, rng.randint(1, 4))}
        case "object":
            return random_object(rng, depth - 1)
        case "array":
            return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(0, 3)}
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 12)}
        case "integer":
            return {"type": "integer", "minimum": 0, "maximum": rng.randint(1, 500)}
        case kind:
            return {"type": kind}


def random_object(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def random_tools(rng: random.Random) -> list[Tool]:
    names = {*rng.sample(NAMES, rng.randint(0, 3)), "_".join(rng.choices(WORDS, k=rng.randint(1, 3)))}
    return [Tool(name, random_object(rng), strict=True) for name in sorted(names)]


def wish(rng: random.Random, call_format: str, tools: list[Tool]) -> str:
    """What a model would like to say: something, and perhaps the beginning of a call, as it likes them."""
    opening = CALL_FORMATS[call_format].opening
    said = "".join(rng.choices(SAID, k=rng.randint(0, 3))) if rng.random() < 0.6 else ""
    name = rng.choice([*(tool.name for tool in tools), "unknown", tools[0].name[:-1]])
    arguments = rng.choice(["arguments", "parameters"])
    call = rng.choice(
        [
            f'{{"name": "{name}", "{arguments}": {{"city": "Par',
            f'{{"name" :"{name}","{arguments}":{{}}}}',
            f'{{"{arguments}": {{}}, "name": "{name}"}}',
            f'{{"type": "function", "name": "{name}", "{arguments}": {{}}}}',
            f'{{"n\\u0061me": "{name}", "{arguments}": {{}}}}',
            f'{name}[ARGS]{{"city": 1',
            f'[{{"name": "{name}", "{arguments}": {{',
            f'{{"name": "{name}"}}',
            "\nnot a call",
        ]
    )
    return said + (opening if opening and rng.random() < 0.7 else "") + rng.choice(["", " ", "\n"]) + call


@dataclass
class Walk:
    """An answer, token by token."""

    token_ids: list[int]
    is_cut: bool


def follow(matcher: Matcher, model: Model, rng: random.Random, wanted: str, longest: int) -> Walk:
    """What a model says that wants to say something, and is held to a grammar; then it says anything, and comes
    to an end."""
    script = model.tokenizer.encode(wanted, add_special_tokens=False)
    said: list[int] = []
    while len(said) < longest:
        mask = np.unpackbits(filled(matcher).view(np.uint8), bitorder="little")
        options = np.flatnonzero(mask)
        assert len(options), "nothing is allowed"
        if script and mask[script[0]]:
            token = script.pop(0)
        else:
            script = []
            if mask[model.ends[0]] and rng.random() < 0.4:
                return Walk(said, is_cut=False)
            short = [each for each in model.closing if mask[each]]
            token = rng.choice(short) if short and rng.random() < 0.8 else int(rng.choice(options))
        if token in model.ends:
            return Walk(said, is_cut=False)
        matcher.advance([token])
        said.append(token)
    return Walk(said, is_cut=True)


def pieces_of(text: str, rng: random.Random) -> list[str]:
    cuts = [0, *sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 9)))), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def read(
    pieces: list[str], call_format: str, tools: list[Tool], *, is_cut: bool, reasoning: str | None
) -> list[Event]:
    parser = parser_of(call_format, [tool.name for tool in tools], reasoning=reasoning, held=True)
    events = [event for piece in pieces for event in parser.push(piece)]
    return merged([*events, *parser.finish(is_cut=is_cut)])


def check(events: list[Event], call_format: str, tools: list[Tool], *, several: bool, is_cut: bool) -> int:
    """Returns how many calls there are."""
    schemas = {tool.name: tool.parameters for tool in tools}
    calls = [event for event in events if isinstance(event, CallBegun)]
    assert several or len(calls) <= 1
    arguments = {event.index: event.text for event in events if isinstance(event, Arguments)}
    for call in calls:
        text = arguments[call.index]
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            assert is_cut, text
            assert call is calls[-1], text
        else:
            jsonschema.validate(found, schemas[call.name])
    content = "".join(event.text for event in events if isinstance(event, Content))
    form = CALL_FORMATS[call_format]
    for mark in filter(None, (form.opening, form.closing)):
        assert mark not in content
    if form.starts_answer:
        listed = r"(\[\s*)?" if form.may_be_listed else ""
        names = "|".join(map(re.escape, schemas))
        assert not re.match(rf'\s*{listed}\{{\s*"name"\s*:\s*"({names})"', content)
    return len(calls)


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.prove)])
def test_every_call_that_begins_is_one(model: Model, count: int) -> None:
    rng = random.Random(count)
    num_calls = num_free = 0
    for _ in range(count):
        call_format, tools, several = rng.choice(FORMATS), random_tools(rng), rng.random() < 0.5
        reasoning = rng.choice([None, None, "think", "mistral"])
        spec = held_grammar(
            call_format,
            tools,
            several=several,
            control_tokens=model.tokenizer.control_tokens(),
            reasoning=None if reasoning is None else REASONING_MARKS[reasoning],
        )
        wanted = wish(rng, call_format, tools)
        if reasoning is not None and rng.random() < 0.5:
            opening, closing = REASONING_MARKS[reasoning]
            wanted = f"{opening}{wish(rng, call_format, tools)}{closing}\n{wanted}"
        matcher = model.compiler.compile(spec).matcher()
        walk = follow(matcher, model, rng, wanted, rng.choice([8, 40, 200]))
        text = model.tokenizer.decode(walk.token_ids, skip_special_tokens=False)
        whole = read([text], call_format, tools, is_cut=walk.is_cut, reasoning=reasoning)
        assert read(pieces_of(text, rng), call_format, tools, is_cut=walk.is_cut, reasoning=reasoning) == whole
        try:
            found = check(whole, call_format, tools, several=several, is_cut=walk.is_cut)
        except Exception as error:
            raise AssertionError((call_format, text, whole, walk.is_cut)) from error
        num_calls += found
        num_free += not found and not any(isinstance(event, Reasoning) for event in whole)
    assert num_calls > count / 5, "the test would show nothing"
    assert num_free > count / 10, "not everything is taken for a call"
