"""Answers read by a response template, as newer tokenizers bring one along."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_parsing import ResponseParser

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
    # Where the template does not fit, nothing is lost.
    *(
        (JSON_CALLS, "", text, [Content(text)])
        for text in (
            'So.\n<tool_call>\n{"name: broken}</tool_call> then <think>x</think>',
            'So.\n<tool_call>\n{"name": "f", "argum',
            '<tool_call>{"x": 1}</tool_call>!',
            "<tool_call>[1]</tool_call>!",
        )
    ),
]


@pytest.mark.parametrize(("template", "begun", "text", "expected"), CASES)
def test_the_template_is_followed_wherever_the_text_is_cut(
    template: dict[str, Any], begun: str, text: str, expected: list[Event]
) -> None:
    for cut in range(len(text)):
        parser = TemplateParser(
            ResponseParser(template, prefix=f"<|im_start|>user\n?{ANCHOR}{begun}", tools=TOOLS)
        )
        assert merged([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.finish()]) == expected
