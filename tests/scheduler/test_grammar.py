"""Answers held to a grammar: any text that its masks allow is one, whatever is drawn."""

from __future__ import annotations

import json
import random
import string
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.text import grammar
from scheduler.text.grammar import GrammarCompiler, GrammarError, Matcher
from scheduler.text.tokenizer import Tokenizer
from tests.scheduler.grammar_walks import ENDS, allowed, filled, walk

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.definition(), ENDS)


def schema(value: Any, *, strict: bool = True) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value), strict)


def accepts(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether this text is one of the grammar's, as the masks say, token for token."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in allowed(matcher):
            with pytest.raises(ValueError, match="does not allow"):
                matcher.advance([token])
            return False
        matcher.advance([token])
    ends = [token for token in allowed(matcher) if token in ENDS]
    assert sorted(ends) in ([], sorted(ENDS)), "all of the model's end tokens, or none"
    return ends != []


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema that some text satisfies."""
    leaves: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"]},
        {"const": rng.choice(["", "é\n", 12, {"a": [1, None]}])},
        {"enum": rng.sample(["one", "two", 'qu"ote', 3, 4.5, None, True, [1], "日本"], rng.randint(1, 5))},
        {"type": "integer", "minimum": -rng.randint(0, 500), "maximum": rng.randint(0, 5000)},
        {"type": "integer", "multipleOf": rng.randint(2, 9), "minimum": 0},
        {"type": "number", "exclusiveMinimum": 0, "maximum": rng.randint(1, 100)},
        {"type": "string", "minLength": (low := rng.randint(0, 5)), "maxLength": low + rng.randint(0, 20)},
        {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^x-", "[0-9]$", r"^\S+@\S+\.(de|fr)$"])},
        {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "date-time"])},
    ]
    if depth == 3 or rng.random() < 0.3:
        return rng.choice(leaves)
    match rng.randrange(4):
        case 0:
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": random_schema(rng, depth + 1),
                "minItems": low,
                "maxItems": low + rng.randint(0, 3),
            }
        case 1:
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case 2:
            return {
                "$defs": {"part": random_schema(rng, 3)},
                "type": "array",
                "maxItems": 2,
                "items": rng.choice(leaves),
            }
        case _:
            names = rng.sample(["name", "größe", "a b", "x/y", "", *string.ascii_lowercase], rng.randint(1, 5))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": rng.choice([False, False, {"type": "integer"}]),
            }


def test_whatever_is_drawn_satisfies_the_schema(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    rng = random.Random(12)
    num_finished = 0
    for _ in range(40):
        wanted = random_schema(rng)
        tokens = walk(compiler.compile(schema(wanted)).matcher(), tokenizer, rng)
        if tokens is None:
            continue
        num_finished += 1
        jsonschema.validate(
            json.loads(tokenizer.decode(tokens)), wanted, format_checker=jsonschema.FormatChecker(["date", "ipv4"])
        )
    assert num_finished > 30


CHARACTERS = st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_characters="\x7f")
"""Those that the tokenizer knows every byte of; delete is written as an escape."""

PEOPLE = st.fixed_dictionaries(
    {"name": st.text(CHARACTERS, min_size=1, max_size=12), "age": st.integers(0, 150)},
    optional={
        "tags": st.lists(st.sampled_from(["a", "b", 3, None]), max_size=3),
        "address": st.fixed_dictionaries(
            {"zip": st.text("0123456789", min_size=5, max_size=5)},
            optional={"street": st.text(CHARACTERS, max_size=30)},
        ),
    },
)


@given(person=PEOPLE, indent=st.sampled_from([None, 0, 1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_whatever_satisfies_the_schema_can_be_drawn(
    tokenizer: Tokenizer, compiler: GrammarCompiler, person: dict[str, Any], indent: int | None
) -> None:
    """In the order of the schema's properties."""
    ordered = {name: person[name] for name in PERSON["properties"] if name in person}
    if "address" in ordered:
        ordered["address"] = dict(sorted(ordered["address"].items()))
    text = json.dumps(ordered, ensure_ascii=False, indent=indent)
    assert accepts(compiler.compile(schema(PERSON)).matcher(), tokenizer, text)


EXAMPLES: list[tuple[GrammarSpec, list[str], list[str]]] = [
    (
        GrammarSpec(GrammarKind.JSON_OBJECT),
        ["{}", '{"a": [1, {"b": null}]}', '{\n    "a": 1\n}'],
        ["[]", "1", "{} "],
    ),
    (schema({"type": "integer"}), ["0", "-12"], ["1.5", '"1"', "01"]),
    (schema(True), ["[1]", '"x"'], ["x"]),
    (schema({"type": "array", "items": {"$ref": "#"}}), ["[[], [[]]]"], ["[1]"]),
    (schema({"oneOf": [{"type": "string"}, {"type": "null"}]}), ['"x"', "null"], ["1"]),
    (schema({"type": "string", "format": "password"}), ['"secret"'], ["1"]),
    (
        schema({"enum": [{"format": "x"}], "properties": {"format": {}}}),
        ['{"format": "x"}'],
        ["{}", '{"format": 1}'],
    ),
    (schema({"x-guidance": {"whitespace_flexible": False}, "type": "array"}), ["[1, 2]"], ["[1,   2]"]),
    (
        GrammarSpec(GrammarKind.JSON_OBJECT, whitespace=""),
        ['{"a":[1,2]}', '{"a":" "}'],
        ['{"a": 1}', "{ }", "{\n}"],
    ),
    (GrammarSpec(GrammarKind.JSON_OBJECT, whitespace="_{0,3}"), ['{"a":___1_}'], ['{"a": 1}', '{"a":____1}']),
    (
        GrammarSpec(
            GrammarKind.JSON_SCHEMA,
            '{"properties": {"properties": {"properties": {"b": {}}}}, "required": ["properties"]}',
            closed=True,
        ),
        ['{"properties": {"b": 1}}', '{"properties": {}}'],
        ['{"properties": {"c": 1}}', '{"properties": {}, "a": 1}'],
    ),
    (
        GrammarSpec(
            GrammarKind.JSON_SCHEMA, '{"properties": {"a": {}}, "additionalProperties": true}', closed=True
        ),
        ['{"b": 1}'],
        ['{"b": }'],
    ),
    (GrammarSpec(GrammarKind.REGEX, r"[a-z]+@\d{2}"), ["ab@12"], ["ab@1", "ab@123", "x ab@12"]),
    (GrammarSpec(GrammarKind.REGEX, "^(yes|no)$"), ["yes", "no"], ["^yes", "yesno"]),
    (
        GrammarSpec(GrammarKind.CHOICE, json.dumps(["red", 'a"b', "a.c", "日本", "\n"])),
        ["red", 'a"b', "日本", "\n"],
        ["abc", "re", "n"],
    ),
    (GrammarSpec(GrammarKind.LARK, 'start: "1" ("+" N)*\nN: /[0-9]+/'), ["1", "1+22+3"], ["1+", "2"]),
    (
        GrammarSpec(GrammarKind.JSON_OBJECT, after="</think>"),
        ["Is it {?\n</think>\n\n{}", '</think>{"a": 1}'],
        ["{}", "</think>", "</think>x"],
    ),
    (
        GrammarSpec(
            GrammarKind.JSON_OBJECT, after=1
        ),  # <|im_start|> stands in for a </think> that is a control token
        ["Is it {?\n<|im_start|>\n\n{}"],
        ["{}", "<|im_start|>", "<|im_start|>x"],
    ),
    (GrammarSpec(GrammarKind.REGEX, "a/[0-9]", after="."), ["Well.a/1"], ["a/1", "Well.a/1."]),
    (GrammarSpec(GrammarKind.LARK, 'start: "a" end\nend: "b"', after="."), ["\n.\n\nab"], [".\n\n\nab"]),
    (GrammarSpec(GrammarKind.LARK, 'root ::= "SELECT " name\nname ::= [a-z]+'), ["SELECT abc"], ["SELECT 1"]),
]


@pytest.mark.parametrize(("spec", "good", "bad"), EXAMPLES)
def test_a_grammar_allows_its_texts_and_no_others(
    tokenizer: Tokenizer, compiler: GrammarCompiler, spec: GrammarSpec, good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert accepts(compiler.compile(spec).matcher(), tokenizer, text), text
    for text in bad:
        assert not accepts(compiler.compile(spec).matcher(), tokenizer, text), text


def test_what_cannot_be_enforced_is_refused_if_strict_and_else_ignored(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    wanted = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(InvalidRequestError, match="uniqueItems"):
        compiler.compile(schema(wanted)).matcher()
    assert accepts(compiler.compile(schema(wanted, strict=False)).matcher(), tokenizer, "[1, 1]")


def test_forgetting_tokens_is_as_if_they_had_not_been_read(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    rng = random.Random(5)
    for _ in range(8):
        tokens = walk(compiler.compile(schema(PERSON)).matcher(), tokenizer, rng)
        assert tokens
        kept = rng.randint(0, len(tokens))
        forgetful, straight = (
            compiler.compile(schema(PERSON)).matcher(),
            compiler.compile(schema(PERSON)).matcher(),
        )
        forgetful.advance([*tokens, ENDS[1]])
        assert forgetful.is_finished
        forgetful.rollback(len(tokens) + 1 - kept)
        straight.advance(tokens[:kept])
        assert (filled(forgetful) == filled(straight)).all()
        assert (forgetful.is_finished, forgetful.forced()) == (straight.is_finished, straight.forced())


def test_a_token_that_is_not_allowed_changes_nothing(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(schema(PERSON)).matcher()
    before = filled(matcher)
    with pytest.raises(ValueError, match="does not allow"):
        matcher.advance(tokenizer.encode('{"name": 12'))
    assert (filled(matcher) == before).all()
    with pytest.raises(ValueError, match="to forget"):
        matcher.rollback(1)


def test_a_finished_text_allows_only_the_end_tokens(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec(GrammarKind.CHOICE, '["yes", "no"]')).matcher()
    assert not matcher.is_finished
    matcher.advance(tokenizer.encode("yes"))
    assert matcher.is_finished
    assert allowed(matcher) == sorted(ENDS)
    matcher.advance([ENDS[0]])
    assert matcher.is_finished
    assert allowed(matcher) == sorted(ENDS)


def test_rows_of_logits_without_a_token_are_not_allowed(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec(GrammarKind.REGEX, "(?s:.*)")).matcher()
    wide = np.full(matcher.num_words + 3, 0xFFFFFFFF, np.uint32)
    narrow = np.full(matcher.num_words - 3, 0xFFFFFFFF, np.uint32)
    matcher.fill(wide)
    matcher.fill(narrow)
    assert (wide[: len(narrow)] == narrow).all()
    assert np.bitwise_count(narrow).sum() > 40_000
    assert not wide[matcher.num_words :].any()


def test_special_tokens_are_not_text(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(schema({"type": "string"})).matcher()
    matcher.advance(tokenizer.encode('"'))
    assert not set(allowed(matcher)) & set(range(17)), "<|im_start|> and the other control tokens"
    assert accepts(matcher, tokenizer, "<|im_start" + '"')  # letter by letter it is text


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (schema({"const": "<|im_end|>x"}), '"<|im_end|>x"'),
        (GrammarSpec(GrammarKind.REGEX, "a<[|]im_start[|]>b"), "a<|im_start|>b"),
        (GrammarSpec(GrammarKind.LARK, 'start: "<|im_end|>" "."'), "<|im_end|>."),
    ],
)
def test_the_name_of_a_special_token_is_written_as_text(
    tokenizer: Tokenizer, compiler: GrammarCompiler, spec: GrammarSpec, text: str
) -> None:
    """Though it is forced, and though the tokenizer would make the token of it."""
    matcher = compiler.compile(spec).matcher()
    assert not set(matcher.forced()) & set(range(17))
    tokens = walk(matcher, tokenizer, random.Random(1))
    assert tokens is not None
    assert not set(tokens) & set(range(17))
    assert tokenizer.decode(tokens) == text


def test_forced_tokens_are_those_that_the_tokenizer_makes(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec(GrammarKind.LARK, 'start: "The temperature is " /[0-9]+/')).matcher()
    forced = matcher.forced()
    whole = tokenizer.encode("The temperature is 20")
    assert len(forced) >= 3
    assert forced == whole[: len(forced)]
    matcher.advance(forced)
    assert not matcher.is_finished


def test_white_space_ends(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """However much the model likes it."""
    spaces = [token for token in range(49152) if not tokenizer.token_text(token).strip(" \n\t\r")]
    assert len(spaces) > 20
    rng = random.Random(0)
    for _ in range(8):
        matcher = compiler.compile(schema({"type": "array", "items": {"type": "null"}, "minItems": 1})).matcher()
        matcher.advance(tokenizer.encode("["))
        num_characters = 0
        while options := [token for token in spaces if token in allowed(matcher)]:
            token = rng.choice(options)
            matcher.advance([token])
            num_characters += len(tokenizer.token_text(token))
        assert 1 <= num_characters <= 42


def test_a_full_lexer_is_replaced(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers with the same grammar fill one; each of them fits into one of its own."""
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(max_lexer_states=1000, verbose_errors=False))
    spec = GrammarSpec(GrammarKind.REGEX, r"[\p{L}\p{N}]{1,100}(.{0,100}x){1,100}")
    rng = random.Random(3)

    def read(matcher: Matcher, count: int) -> None:
        for _ in range(count):
            matcher.advance([rng.choice(allowed(matcher))])

    matchers = [compiler.compile(spec).matcher() for _ in range(6)]
    for _ in range(3):
        for matcher in matchers:
            read(matcher, 8)
    with pytest.raises(GrammarError, match="too many states"):
        read(matchers[0], 1000)


def test_equal_grammars_are_compiled_once(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = schema({"type": "object", "properties": {"once": {}}})
    compiler.compile(spec).matcher()
    monkeypatch.setattr(grammar, "compilable", None)
    compiler.compile(GrammarSpec(spec.kind, spec.text)).matcher()
