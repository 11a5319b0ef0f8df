"""Answers read by a response template, as newer tokenizers bring one along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_parsing import ResponseParser

from scheduler.text.tokenizer import Tokenizer
from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning, merged
from server.parsing.template_parser import TemplateParser

ANCHOR = "<|im_start|>assistant\n"
THINKING = {"open": "<think>", "close": "</think>"}
JSON_CALLS: dict[str, Any] = {
    "start_anchor": ANCHOR,
    "fields": {
        "reasoning_content": THINKING,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}
XML_CALLS: dict[str, Any] = {
    "start_anchor": ANCHOR,
    "fields": {
        "thinking": THINKING,
        "tool_calls": {
            "open_pattern": r"\s*<function=(?P<name>\w+)>",
            "close": "</function>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\w+>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}
]


def call(index: int, name: str, arguments: str) -> list[Event]:
    return [CallBegun(index, name), Arguments(index, arguments)]


CASES: list[tuple[dict[str, Any], str, str, list[Event]]] = [
    (XML_CALLS, "", "<think>Hm.</think>Yes.", [Reasoning("Hm."), Content("Yes.")]),
    (XML_CALLS, "<think>", "Hm.</think>Yes.", [Reasoning("Hm."), Content("Yes.")]),
    (
        XML_CALLS,
        "",
        "I ask.\n<function=f><a>7</a><b>8</b></function>\n<function=g></function>",
        [Content("I ask."), *call(0, "f", '{"a": 7, "b": "8"}'), *call(1, "g", "{}")],
    ),
    (
        JSON_CALLS,
        "",
        'So.\n<tool_call>\n{"name": "f", "arguments": {"a": "ö"}}\n</tool_call> Done.',
        [Content("So."), *call(0, "f", '{"a": "ö"}'), Content(" Done.")],
    ),
    (JSON_CALLS, "", "a <tool b", [Content("a <tool b")]),
]

MISFITS = [
    'So.\n<tool_call>\n{"name: broken}</tool_call> then <think>x</think>',
    'So.\n<tool_call>\n{"name": "f", "argum',
    '<tool_call>{"x": 1}</tool_call>!',
    "<tool_call>[1]</tool_call>!",
]


def read(template: dict[str, Any], begun: str, text: str, cut: int) -> list[Event]:
    prompt = f"<|im_start|>user\n?{ANCHOR}{begun}"
    parser = TemplateParser(ResponseParser(template, prefix=prompt, tools=TOOLS))
    return merged([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.finish()])


@pytest.mark.parametrize(("template", "begun", "text", "expected"), CASES)
def test_the_template_is_followed_wherever_the_text_is_cut(
    template: dict[str, Any], begun: str, text: str, expected: list[Event]
) -> None:
    for cut in range(len(text)):
        assert read(template, begun, text, cut) == expected


@pytest.mark.parametrize("text", MISFITS)
def test_nothing_is_lost_where_the_template_does_not_fit(text: str) -> None:
    for cut in range(len(text)):
        assert read(JSON_CALLS, "", text, cut) == [Content(text)]


def test_the_tokenizer_knows_the_template(model_path: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((Path(model_path) / name).read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"response_template": JSON_CALLS}))
    assert not Tokenizer(model_path).has_response_template
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.has_response_template
    prompt = tokenizer.encode(f"{ANCHOR}<think>\n", add_special_tokens=False)
    parser = TemplateParser(tokenizer.response_parser(prompt, TOOLS))
    assert merged(parser.push("Hm.</think>Yes.")) == [Reasoning("Hm."), Content("Yes.")]
