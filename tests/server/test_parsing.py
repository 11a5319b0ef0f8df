"""The calls and the reasoning in an answer's text: found in every format, however the text is cut, and nothing
lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.models.files.model_source import models_folder
from scheduler.text.tokenizer import Tokenizer
from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning, merged
from server.parsing.formats import call_format_of, has_begun, marks, parser_of, reasoning_of

TOOLS = ("f", "get_weather", "files.read")
QWEN = models_folder() / "Qwen2.5-Coder-0.5B-Instruct"


def call(index: int, name: str, arguments: str) -> list[Event]:
    return [CallBegun(index, name), Arguments(index, arguments)]


def read(pieces: Sequence[str], call_format: str | None, **options: Any) -> list[Event]:
    parser = parser_of(call_format, TOOLS, **options)
    events = [event for piece in pieces for event in parser.push(piece)]
    return merged(events + parser.finish())


PARIS = '{"city": "Paris", "days": [1, 2.5e3, -0], "exact": true, "more": {"a": null}}'
CALLS: list[tuple[str, str, list[Event]]] = [
    # As Qwen's template writes them.
    (
        "hermes",
        f'\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n'
        '{"name": "f", "arguments": {}}\n</tool_call>',
        [*call(0, "get_weather", PARIS), *call(1, "f", "{}")],
    ),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "f"}\n</tool_call>',
        [Content("Let me see."), *call(0, "f", "{}")],
    ),
    # As Hermes' does.
    (
        "hermes",
        '\n<tool_call>\n{ "arguments": {"a": "}</tool_call>"}, "name": "f"}\n</tool_call> ',
        call(0, "f", '{"a": "}</tool_call>"}'),
    ),
    ("hermes", '<tool_call>{"name": "unheard of", "arguments": {}}', call(0, "unheard of", "{}")),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call(0, "f", '{"a": 1}')),
    ("hermes", '<tool_call>{"id": {"name": "g"}, "name": "f", "arguments": null}', call(0, "f", "{}")),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"code": "x = 1\n\ty = \'\\d\'"}}</tool_call>\n\nDone.',
        [*call(0, "f", '{"code": "x = 1\\n\\ty = \'\\\\d\'"}'), Content("\n\nDone.")],
    ),
    # As Llama 3.1's template writes them, with the tag and without, and several.
    ("llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}', call(0, "get_weather", PARIS)),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}', call(0, "f", "{}")),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 2}}',
        [*call(0, "f", '{"a": 1}'), *call(1, "f", '{"a": 2}')],
    ),
    (
        "llama3_json",
        'I ask.<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}',
        [Content("I ask."), *call(0, "f", '{"a": 1}')],
    ),
    # As Mistral's templates write them.
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}, "id": "abcdefghi"}}, '
        '{"name": "f", "arguments": {}, "id": "123456789"}]',
        [*call(0, "get_weather", PARIS), *call(1, "f", "{}")],
    ),
    (
        "mistral_args",
        f'Yes.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]files.read[CALL_ID]abcdefghi[ARGS]{{"a": 1}}',
        [Content("Yes."), *call(0, "get_weather", PARIS), *call(1, "files.read", '{"a": 1}')],
    ),
    ("mistral_args", '[TOOL_CALLS]f{"a": 1}', call(0, "f", '{"a": 1}')),
    # As Llama 4's template writes them.
    (
        "pythonic",
        '[get_weather(city="Paris (\\"France\\")", days=[1, -2.5, {"a": (None, true)}]), files.read(), f(a=\'\')]',
        [
            *call(0, "get_weather", '{"city": "Paris (\\"France\\")", "days": [1, -2.5, {"a": [null, true]}]}'),
            *call(1, "files.read", "{}"),
            *call(2, "f", '{"a": ""}'),
        ],
    ),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", call(0, "f", '{"a": 1}')),
    # As `call_grammar` has models write that were taught no format.
    (
        "json",
        '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]',
        [*call(0, "f", '{"a": 1}'), *call(1, "f", "{}")],
    ),
    ("json", '{"name": "f", "arguments": {"a": 1}}', call(0, "f", '{"a": 1}')),
]

NO_CALLS = [
    ("hermes", "Nothing to call.\n"),
    ("hermes", "  \n"),
    ("hermes", "A <tool_call> is a mark, and so is <tool_"),
    ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call> '),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call>"),
    ("hermes", '<tool_call>{"name": "f",}</tool_call>'),
    ("hermes", '<tool_call>{"name" "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "x": 01}</tool_call>'),
    ("hermes", "<tool_call> <tool_call> <tool_call>"),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", ' {"a": 1} '),
    ("llama3_json", 'The call is {"name": "f", "parameters": {}}.'),
    ("mistral", "[TOOL_CALLS] are made when {"),
    ("mistral", "[TOOL_CALLS][1, 2]"),
    ("mistral_args", "[TOOL_CALLS]f of x[ARGS]{}"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[f(x)]"),
    ("pythonic", "[f(a=b)]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a={1})]"),
    ("pythonic", "[f(**x)]"),
    ("pythonic", "[g(a=1)]"),
    ("pythonic", "[f(a=" + "(" * 2000 + ")" * 2000 + ")]"),
    ("pythonic", 'f(a="1")'),
    ("json", "[1, 2]"),
    ("json", '{"name": "Bob", "arguments": {}}'),
    ("json", ""),
]

BROKEN: list[tuple[str, str, list[Event]]] = [
    # What has begun remains a call, and what comes then was meant as its arguments.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', call(0, "f", '{"a": [1')),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": None}}</tool_call> tail',
        [*call(0, "f", '{"a": None}}'), Content(" tail")],
    ),
    ("llama3_json", '{"name": "f", "parameters": {"a": }} tail', call(0, "f", '{"a": }} tail')),
    # What breaks off between calls, or comes after them, is content.
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, nothing',
        [*call(0, "f", "{}"), Content(", nothing")],
    ),
    ("json", '{"name": "f", "arguments": {}} and so on', [*call(0, "f", "{}"), Content(" and so on")]),
    (
        "hermes",
        'a <tool_call>no <tool_call>{"name": "f"}</tool_call> b <tool_call>c',
        [Content("a <tool_call>no"), *call(0, "f", "{}"), Content(" b <tool_call>c")],
    ),
]


@pytest.mark.parametrize(("call_format", "text", "expected"), CALLS + BROKEN)
def test_calls_are_found_wherever_the_text_is_cut(call_format: str, text: str, expected: list[Event]) -> None:
    assert read([text], call_format) == expected
    assert read(list(text), call_format) == expected
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]], call_format) == expected
        rest = random.Random(cut).randint(cut, len(text))
        assert read([text[:cut], text[cut:rest], text[rest:]], call_format) == expected


@pytest.mark.parametrize(("call_format", "text"), NO_CALLS)
def test_what_is_no_call_is_content_to_the_letter(call_format: str, text: str) -> None:
    expected = [Content(text)] if text else []
    assert read([text], call_format) == expected
    assert read(list(text), call_format) == expected


@pytest.mark.parametrize(
    ("text", "is_thinking", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, [Reasoning("Hm."), Content("Yes.")]),
        ("Hm </thin\n</think>\n\nYes.\n", True, [Reasoning("Hm </thin"), Content("Yes.\n")]),
        ("<think>Hm.</think>Yes.", True, [Reasoning("Hm."), Content("Yes.")]),
        ("\n<think>\n\n</think>\n\nYes.", False, [Content("Yes.")]),
        ("Yes. <think>no</think>", False, [Content("Yes. <think>no</think>")]),
        (" <thin air>", False, [Content(" <thin air>")]),
        ("Hm, cut sho", True, [Reasoning("Hm, cut sho")]),
        (
            '<think>I <tool_call>{"name": "f"}</think>\n<tool_call>{"name": "f"}</tool_call>',
            False,
            [Reasoning('I <tool_call>{"name": "f"}'), *call(0, "f", "{}")],
        ),
        ("", True, []),
    ],
)
def test_reasoning_is_parted_from_the_answer(text: str, is_thinking: bool, expected: list[Event]) -> None:
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        assert read(pieces, "hermes", reasoning="think", is_thinking=is_thinking) == expected


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>"),
    *(
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "f", "parameters": ',
        '{"a": "',
        '"}',
        "}",
        "[",
        "]",
        ", ",
    ),
    *("f(a=1)", "f(", ")", '"', "'", "\\", "\n", " ", "some text", ";", "<", "[T", "1", "true"),
]


@given(
    st.sampled_from(["hermes", "llama3_json", "mistral", "pythonic", "json"]),
    st.sampled_from([None, "think"]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.data(),
)
@settings(max_examples=400, deadline=None)
def test_cuts_never_matter(call_format: str, reasoning: str | None, text: str, data: st.DataObject) -> None:
    whole = read([text], call_format, reasoning=reasoning)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, call_format, reasoning=reasoning) == whole
    if reasoning is None and not any(isinstance(event, CallBegun) for event in whole):
        assert whole == ([Content(text)] if text else [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans(), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_any_arguments_arrive(arguments: dict[str, Any], ascii_only: bool, size: int) -> None:
    text = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=ascii_only)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    begun, written = read(pieces, "json")
    assert begun == CallBegun(0, "f")
    assert isinstance(written, Arguments)
    assert json.loads(written.text) == arguments


def test_arguments_come_as_they_are_written() -> None:
    parser = parser_of("hermes")
    assert parser.push('<tool_call>\n{"name": "f"') == []
    assert parser.push(', "arguments": {"te') == [CallBegun(0, "f"), Arguments(0, '{"te')]
    assert parser.push('xt": "one two') == [Arguments(0, 'xt": "one two')]
    assert parser.push(' three"}}') == [Arguments(0, ' three"}')]
    assert parser.push("\n</tool_") == []
    assert parser.push("call>") == []
    assert parser.finish() == []


def test_text_comes_as_it_is_written() -> None:
    parser = parser_of("hermes", reasoning="think")
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(", you <to") == [Content(", you")]  # <tool_call> and the space before it are possible yet
    assert parser.push("day>") == [Content(" <today>")]


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        ("{{ message.content }}", None, None),
        ("<tool_call>\n<function=name>", None, None),
        ("{{- '[TOOL_CALLS][' }}", "mistral", None),
        ("{{- '[TOOL_CALLS]' + name + '[ARGS]' }} [THINK] [/THINK]", "mistral_args", "mistral"),
        ('Environment: ipython ... {"name": function name, "parameters": dictionary}', "llama3_json", None),
        ("Environment: ipython ... [func_name1(params_name1=value), func_name2()]", "pythonic", None),
        ("content.split('</think>')[-1] ... <tool_call>\n{", "hermes", "think"),
    ],
)
def test_the_template_says_which_formats_there_are(
    template: str, calls: str | None, reasoning: str | None
) -> None:
    assert call_format_of(template) == calls
    assert reasoning_of(template) == reasoning


def test_the_prompt_says_whether_reasoning_has_begun() -> None:
    assert has_begun("<|im_start|>assistant\n<think>\n", "qwen3")
    assert not has_begun("<|im_start|>assistant\n<think>\n\n</think>\n\n", "qwen3")


def test_a_parser_needs_its_marks_in_the_text() -> None:
    assert marks("mistral", None) == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}
    assert marks("hermes", "think") == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert marks("json", None) == marks(None, None) == frozenset()


@pytest.mark.skipif(not QWEN.is_dir(), reason="Qwen2.5-Coder-0.5B-Instruct is not in the cache")
def test_what_qwen_itself_would_write() -> None:
    """Its template words a conversation with calls; the same text as tokens, one by one, gives them back."""
    tokenizer = Tokenizer(str(QWEN))
    assert call_format_of(tokenizer.chat_template.source) == "hermes"
    arguments = [{"city": "Köln", "note": 'a "quoted"\n<b>'}, {}]
    message = {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": value}} for value in arguments],
    }
    user = [{"role": "user", "content": "?"}]
    asked = tokenizer.apply_chat_template(user, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template([*user, message], add_generation_prompt=False)
    answer = answered[len(asked) :]
    assert 151657 in answer, "the mark is one token"
    pieces: Callable[[int], str] = lambda end: tokenizer.decode(answer[:end])  # noqa: E731
    events = read([pieces(end + 1)[len(pieces(end)) :] for end in range(len(answer))], "hermes")
    content, *calls = events
    assert content == Content("Let me look.")
    assert [json.loads(event.text) for event in calls if isinstance(event, Arguments)] == arguments


# Answers that are cut --------------------------------------------------------------------------------------

CUT = [
    ("hermes", 'Hi <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Hi"),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ""),
    ("mistral", 'Hi [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', "Hi"),
    ("mistral_args", 'Hi [TOOL_CALLS]f[ARGS]{"a": 1}', "Hi"),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", ""),
]


@pytest.mark.parametrize(("call_format", "text", "said"), CUT, ids=[name for name, *_ in CUT])
def test_a_call_that_is_cut_is_no_content(call_format: str, text: str, said: str) -> None:
    start = len(said) + 3 if said else 2  # one character of a mark says too little
    for end in range(start, len(text) + 1):
        parser = parser_of(call_format, TOOLS)
        events = merged([*parser.push(text[:end]), *parser.finish(is_cut=True)])
        content = "".join(event.text for event in events if isinstance(event, Content))
        assert content.rstrip() == said, text[:end]
    parser = parser_of(call_format, TOOLS)
    events = [*parser.push(text[: start + 1]), *parser.finish()]
    assert "".join(event.text for event in events if isinstance(event, Content)) == text[: start + 1]


@pytest.mark.parametrize(
    ("call_format", "text", "said"),
    [
        ("json", '{"name": "get_we', ""),
        ("json", '[{"name": "f", "arguments": {}}, {"na', ""),
        ("json", '{"name": "Alice", "age": ', '{"name": "Alice", "age": '),
        ("hermes", '{"name": "f", "argum', ""),
        ("hermes", "a < b <", "a < b <"),
        ("pythonic", '[get_weather(city="Par', ""),
        ("pythonic", "[1, 2", "[1, 2"),
    ],
)
def test_what_no_mark_tells_is_content_unless_it_has_a_tools_name(call_format: str, text: str, said: str) -> None:
    parser = parser_of(call_format, TOOLS)
    events = merged([*parser.push(text), *parser.finish(is_cut=True)])
    assert "".join(event.text for event in events if isinstance(event, Content)) == said


def test_marks_of_reasoning_that_are_cut_are_not_said() -> None:
    for text, thought in (("<thi", ""), ("<think>a</thin", "a"), ("<think>a<", "a<")):
        parser = parser_of(None, reasoning="think")
        events = merged([*parser.push(text), *parser.finish(is_cut=True)])
        assert events == ([Reasoning(thought)] if thought else [])
