"""Answers held to a form, as OpenAI's client asks for it, and what becomes of forms that are none."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.server.conftest import MODEL
from tests.server.serving import Server

ASKED: Any = [{"role": "user", "content": "Describe a person as JSON."}]


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["merry", "sober"]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of_schema(schema: Any, *, strict: bool = True) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": strict}}


def test_a_pydantic_model_comes_back(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=Person, max_tokens=200, seed=1
    )
    person = parsed.choices[0].message.parsed
    assert isinstance(person, Person)
    assert parsed.choices[0].finish_reason == "stop"


def test_json_objects_streamed_and_whole(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": ASKED,
        "max_tokens": 40,
        "temperature": 0,
        "response_format": of_schema(PERSON),
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    jsonschema.validate(json.loads(whole), PERSON)
    asked["response_format"] = {"type": "json_object"}
    asked["max_tokens"] = 60
    answer = client.chat.completions.create(**asked, logit_bias={"2": 5}).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content or ""), dict)
    else:
        assert (answer.message.content or "").startswith("{")


OPEN = {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"], "type": "object"}
PAIR = {**OPEN, "additionalProperties": False}
PAIR_TEXT = r'\{{{0}"a"{0}:{0}1{0},{0}"b"{0}:{0}2{0}\}}'


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[A-Z][a-z]{2}-[0-9]{4}"}}, "[A-Z][a-z]{2}-[0-9]{4}"),
        ({"structured_outputs": {"choice": ["yes", "no|maybe"]}}, r"yes|no\|maybe"),
        ({"structured_outputs": {"grammar": 'start: ("a" | "bc")~3'}}, "(a|bc){3}"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
        ({"structured_outputs": {"json": {"enum": [17]}}}, "17"),
        ({"guided_regex": "[ab]{5}"}, "[ab]{5}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "q"'}, "q"),
        ({"guided_json": {"const": "it"}}, '"it"'),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
        ({"structured_outputs": {"json": PAIR, "disable_any_whitespace": True}}, PAIR_TEXT.format("")),
        ({"structured_outputs": {"json": PAIR, "whitespace_pattern": "_"}}, PAIR_TEXT.format("_?")),
        ({"guided_json": PAIR, "guided_whitespace_pattern": "_{2}"}, PAIR_TEXT.format("(__)?")),
        ({"guided_json": PAIR}, PAIR_TEXT.format(r"\s*")),
        (
            {"structured_outputs": {"json": OPEN, "disable_additional_properties": True}},
            PAIR_TEXT.format(r"\s*"),
        ),
        ({"response_format": {"type": "json_object", "schema": PAIR}}, PAIR_TEXT.format(r"\s*")),
        ({"response_format": {"type": "json_schema", "schema": PAIR}}, PAIR_TEXT.format(r"\s*")),
        ({"json_schema": {"const": "it"}}, '"it"'),
        ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ],
)
def test_other_forms(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Say:", max_tokens=20, n=4, temperature=1.5, seed=2, extra_body=fields
    )
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.text), choice.text
        assert choice.finish_reason == "stop"


PATTERN = "structured_outputs.whitespace_pattern"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "text', 'json_object"),
        ({"response_format": of_schema({"type": "objekt"})}, "response_format", "objekt"),
        ({"response_format": of_schema({"$ref": "#/nowhere"})}, "response_format", "nowhere"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one of them"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "give one of them"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids", "leave nothing"),
        ({"guided_regex": "a{1000}" * 1000}, "guided_regex", ""),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "(a"}}, "structured_outputs", ""),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "a" * 257}}, PATTERN, "at most 256"),
        ({"guided_regex": "(a{1000}){1000}"}, "guided_regex", ""),
        ({"guided_json": {"enum": [str(i) * 9 for i in range(100_000)]}}, "guided_json", "characters"),
    ],
)
async def test_forms_that_are_none(server: Server, fields: dict[str, Any], param: str, message: str) -> None:
    status, answer = await server.post("/v1/completions", {"prompt": "a", "max_tokens": 4, **fields})
    assert status == 400, answer
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] == param


TEXTS = st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF), max_size=5)
"""Of what lies beyond, the default model has no tokens for some bytes."""

SCHEMAS = st.recursive(
    st.one_of(
        st.just({"type": "integer", "minimum": -99, "maximum": 999}),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda length: {"type": "string", "maxLength": length}, st.integers(0, 8)),
        st.builds(lambda values: {"enum": values}, st.lists(TEXTS, min_size=1, max_size=4)),
    ),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
            st.dictionaries(st.text("abcdefgh", min_size=1, max_size=4), inner, max_size=3),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=4,
)


def random_schemas(count: int) -> list[Any]:
    """As hypothesis makes them; each has some instance."""
    found: list[Any] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def collect(schema: Any) -> None:
        from_schema(schema)
        found.append(schema)

    collect()
    return found[:count]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.prove)])
async def test_random_schemas_among_others(async_client: AsyncOpenAI, count: int) -> None:
    """At temperature 1, 32 at a time, among as many that are free."""
    schemas = random_schemas(count)
    gate = asyncio.Semaphore(32)

    async def answer(schema: Any, seed: int) -> tuple[str | None, str]:
        fields = {} if schema is None else {"response_format": of_schema(schema)}
        async with gate:
            made = await async_client.chat.completions.create(
                model=MODEL, messages=ASKED, temperature=1, seed=seed, max_tokens=32, extra_body=fields
            )
        return made.choices[0].message.content, made.choices[0].finish_reason

    async def alone_and_among(schema: Any, seed: int) -> str:
        (text, reason), _ = await asyncio.gather(answer(schema, seed), answer(None, seed))
        if reason == "stop":
            jsonschema.validate(json.loads(text or ""), schema)
        return reason

    reasons = await asyncio.gather(*(alone_and_among(schema, seed) for seed, schema in enumerate(schemas)))
    assert reasons.count("stop") > count * 0.8
    alone = [await answer(schema, seed) for seed, schema in enumerate(schemas[:3])]
    together = await asyncio.gather(*(answer(schema, seed) for seed, schema in enumerate(schemas[:3])))
    assert list(together) == alone


def test_a_client_that_leaves_while_its_grammar_compiles_leaves_nothing(client: OpenAI, server: Server) -> None:
    huge = {
        "type": "object",
        "properties": {f"k{i}": {"type": "string", "pattern": "^[a-z]+$"} for i in range(500)},
    }
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).chat.completions.create(
            model=MODEL, messages=ASKED, response_format=of_schema(huge)
        )
    asyncio.run(server.until_idle())
