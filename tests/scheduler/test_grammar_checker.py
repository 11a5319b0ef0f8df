"""Hostile grammars are refused, one and all, and the server outlives them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.text.grammar_checker import TOO_MUCH_WORK, GrammarChecker, NotCheckedError
from scheduler.text.tokenizer import Tokenizer
from tests.scheduler.grammar_walks import ENDS


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)


@pytest.fixture(scope="module")
def checker(tokenizer: Tokenizer) -> Iterator[GrammarChecker]:
    checker = GrammarChecker(tokenizer.definition, ENDS)
    yield checker
    checker.close()


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value))


def chain(name: str, length: int, link: str) -> str:
    """A Lark grammar of rules, or of terminals if the name is in capitals, of which each refers to the next."""
    links = (f"{name}{i}: {link.format(f'{name}{i + 1}')}" for i in range(length))
    return "\n".join([f"start: {name}0", *links, f'{name}{length}: "a"'])


LEVELS = 100_000
HOSTILE = {
    "levels": (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"items":' * LEVELS + "{}" + "}" * LEVELS), "characters"),
    "levels that fit": (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"items":' * 900 + "{}" + "}" * 900), "levels"),
    "levels beyond python": (GrammarSpec(GrammarKind.JSON_SCHEMA, "[" * 20_000 + "]" * 20_000), "recursion"),
    "megabytes": (GrammarSpec(GrammarKind.JSON_SCHEMA, " " * (10 << 20) + "{}"), "characters"),
    "a huge enum": (schema({"enum": [f"value {i}" for i in range(100_000)]}), "characters"),
    "itself": (schema({"$ref": "#"}), "no text satisfies"),
    "each other": (
        schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        "no text satisfies",
    ),
    "a circle through allOf": (schema({"allOf": [{"$ref": "#"}, {"type": "object"}]}), "circular"),
    "a product of choices": (
        schema({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(9)]} for i in range(12)]}),
        "too large",
    ),
    "doubling": (
        schema(
            {
                "$defs": {
                    f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}, {"type": "object"}]}
                    for i in range(30)
                }
                | {"a30": {"type": "object"}},
                "$ref": "#/$defs/a0",
            }
        ),
        "too large",
    ),
    "patterns at once, which would take minutes": (
        schema({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 30)]}),
        TOO_MUCH_WORK,
    ),
    "a chain of rules, which overflows the stack": (
        GrammarSpec(GrammarKind.LARK, chain("r", 3000, '"x" {}')),
        TOO_MUCH_WORK,
    ),
    "thousands of alternatives at once": (
        schema({"anyOf": [{"type": "array", "items": {"type": "array", "minItems": i}} for i in range(800)]}),
        "items",
    ),
    "thousands of optional properties": (
        schema({"properties": {f"property {i}": {"type": "integer"} for i in range(5000)}}),
        "too big",
    ),
    "a thousand of them": (
        schema({"properties": {f"property {i}": {"type": "integer"} for i in range(1000)}}),
        "Too many items",
    ),
    "an exponential regex": (GrammarSpec(GrammarKind.REGEX, r"(\w{1,100}){1,100}"), "too many"),
    "a long regex": (GrammarSpec(GrammarKind.REGEX, "abc" * 10_000), "characters"),
    "parentheses": (GrammarSpec(GrammarKind.REGEX, "(" * 5000 + "a" + ")" * 5000), "invalid regex"),
    "look-around": (GrammarSpec(GrammarKind.REGEX, "(?=a)b"), "look-around"),
    "an empty class": (GrammarSpec(GrammarKind.REGEX, r"[^\s\S]"), "no text satisfies"),
    "half a character": (GrammarSpec(GrammarKind.REGEX, "a\ud800"), "UTF-8"),
    "terminals that double": (GrammarSpec(GrammarKind.LARK, chain("T", 40, "{0} {0}")), "too big"),
    "a circle of terminals": (GrammarSpec(GrammarKind.LARK, 'start: A\nA: "a" A | "b"'), "circular"),
    "rollback not possible": (GrammarSpec(GrammarKind.LARK, "start: x\nx[max_tokens=3]: /a*/"), "rollback"),
    "llguidance's own JSON": (GrammarSpec(GrammarKind.LARK, '{"grammars": []}'), "neither"),
    "no Lark": (GrammarSpec(GrammarKind.LARK, 'start: "a'), "lexer error"),
    "no GBNF": (GrammarSpec(GrammarKind.LARK, 'root ::= (((( "a"'), "GBNF"),
    "no schema": (GrammarSpec(GrammarKind.JSON_SCHEMA, "[]"), "object"),
    "no JSON": (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": NaN}'), "NaN"),
    "nothing": (schema(False), "object"),
    "a type that is none": (schema({"type": "strin"}), "strin"),
    "no choice": (GrammarSpec(GrammarKind.CHOICE, "[]"), "non-empty"),
    "choices of numbers": (GrammarSpec(GrammarKind.CHOICE, "[1]"), "non-empty"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused(checker: GrammarChecker, name: str) -> None:
    spec, expected = HOSTILE[name]
    for _ in range(2):  # the second time from memory
        with pytest.raises(InvalidRequestError) as caught:
            checker.check(spec, "response_format")
        assert expected in str(caught.value)
        assert caught.value.param == "response_format"
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "spec",
    [
        schema({"type": "string", "minLength": 10**9}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
        schema({"enum": [f"value number {i}" for i in range(10_000)]}),
        GrammarSpec(GrammarKind.REGEX, "(a|b)*a(a|b){1000}"),
        GrammarSpec(GrammarKind.REGEX, "((a{0,1000}){0,1000}){0,1000}"),
        GrammarSpec(GrammarKind.JSON_OBJECT),
    ],
)
def test_what_only_looks_enormous_is_served(checker: GrammarChecker, spec: GrammarSpec) -> None:
    checker.check(spec)


def test_a_checker_whose_process_is_gone_starts_another(tokenizer: Tokenizer) -> None:
    checker = GrammarChecker(tokenizer.definition, ENDS)
    checker.check(schema({"type": "integer"}))
    checker.close()
    checker.check(schema({"type": "number"}))
    checker.close()


def test_a_tokenizer_of_another_kind_cannot_be_held_to_a_grammar() -> None:
    checker = GrammarChecker(lambda: '{"model": {}}', ENDS)
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        checker.check(GrammarSpec(GrammarKind.JSON_OBJECT))
    checker.close()


def test_what_is_known_does_not_wait_for_what_is_new(checker: GrammarChecker) -> None:
    good, bad, new = schema({"type": "boolean"}), schema(False), schema({"const": 5})
    checker.check(good)
    with pytest.raises(InvalidRequestError):
        checker.check(bad)
    long = schema({"allOf": [{"type": "string", "pattern": f"c.{{{i}}}d"} for i in range(1, 30)]})
    with ThreadPoolExecutor(1) as beside:
        trying = beside.submit(checker.check, long)
        time.sleep(0.2)
        assert checker.check_known(good)
        assert not checker.check_known(new)
        with pytest.raises(InvalidRequestError, match="object") as caught:
            checker.check_known(bad, "guided_json")
        assert caught.value.param == "guided_json"
        assert not trying.done()
        with pytest.raises(InvalidRequestError):
            trying.result()


def test_a_checker_that_is_stopped_is_replaced(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it does not answer says nothing of the grammar, which is tried once more."""
    monkeypatch.setattr("scheduler.text.grammar_checker.MAX_WAIT", 5.0)
    before = set(psutil.Process().children())
    checker = GrammarChecker(tokenizer.definition, ENDS)
    checker.check(GrammarSpec(GrammarKind.REGEX, "a"))
    (process,) = set(psutil.Process().children()) - before
    process.suspend()
    checker.check(GrammarSpec(GrammarKind.REGEX, "b"))
    assert not process.is_running()
    monkeypatch.setattr("scheduler.text.grammar_checker.MAX_WAIT", 0.0)
    with pytest.raises(NotCheckedError, match="try again"):
        checker.check(GrammarSpec(GrammarKind.REGEX, "c"))
    checker.close()


def test_a_verdict_is_the_same_alone_and_under_load(tokenizer: Tokenizer) -> None:
    """It is a count of the parser's work: however long that takes."""
    ambiguous = "start: a\na: " + " | ".join(["a a", '"x"', *(" ".join("a" * count) for count in range(3, 10))])
    specs = [
        GrammarSpec(GrammarKind.LARK, ambiguous),
        schema({"properties": {f"property {i}": {"type": "integer"} for i in range(1000)}}),
        schema({"properties": {f"property {i}": {"type": "integer"} for i in range(300)}}),
    ]

    def verdicts() -> list[str]:
        checker = GrammarChecker(tokenizer.definition, ENDS)
        found = []
        for spec in specs:
            try:
                checker.check(spec)
                found.append("")
            except InvalidRequestError as error:
                found.append(str(error))
        checker.close()
        return found

    alone = verdicts()
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        assert verdicts() == alone
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert ["items" in each for each in alone] == [True, True, False]
