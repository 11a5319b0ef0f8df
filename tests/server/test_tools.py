"""Calls of tools: of a model that was taught to make them, and of the default one, which is held to a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests.server.conftest import MODEL, QWEN
from tests.server.serving import Server

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "maxLength": 8}},
            "required": ["zone"],
        },
    },
}
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


@pytest.fixture(scope="module")
def qwen(qwen_server: Server) -> Iterator[OpenAI]:
    with qwen_server.client() as client:
        yield client


def ask(client: OpenAI, model: str = QWEN, messages: Any = ASKED, **fields: Any) -> ChatCompletion:
    fields = {"tools": [WEATHER, TIME], "temperature": 0, "max_tokens": 80} | fields
    create: Any = client.chat.completions.create
    answer: ChatCompletion = create(model=model, messages=messages, **fields)
    return answer


def streamed(client: OpenAI, **fields: Any) -> tuple[str, list[dict[str, str]], list[str | None]]:
    """The content, the calls and the finish reasons of a stream."""
    content, reasons = "", []
    calls: list[dict[str, str]] = []
    stream: Any = ask(client, stream=True, **fields)
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(calls)
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments
    return content, calls, [reason for reason in reasons if reason]


def test_a_model_calls_and_goes_on_with_what_it_is_told(qwen: OpenAI) -> None:
    choice = ask(qwen).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"].startswith("Paris")
    told = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21, "sky": "clear"}'}
    messages = [*ASKED, choice.message.model_dump(exclude_none=True), told]
    answer = ask(qwen, messages=messages, tool_choice="none").choices[0]
    assert answer.finish_reason == "stop"
    assert "21" in (answer.message.content or "")


@pytest.mark.parametrize(
    "choice", ["auto", "required", "none", {"type": "function", "function": {"name": "get_time"}}]
)
def test_streams_say_the_same(qwen: OpenAI, choice: Any) -> None:
    whole = ask(qwen, tool_choice=choice, max_tokens=60).choices[0]
    content, calls, reasons = streamed(qwen, tool_choice=choice, max_tokens=60)
    assert content == (whole.message.content or "")
    assert calls == [
        {"name": call.function.name, "arguments": call.function.arguments}  # type: ignore[union-attr]
        for call in whole.message.tool_calls or []
    ]
    assert reasons == [whole.finish_reason]
    if choice == "none":
        assert not calls
    if isinstance(choice, dict):
        assert [call["name"] for call in calls] == ["get_time"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.prove) for seed in (1, 2))])
def test_even_the_default_model_gives_valid_calls_where_it_has_to(client: OpenAI, seed: int) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, TIME)}
    answer = ask(client, MODEL, tool_choice="required", temperature=1, seed=seed, max_tokens=200)
    choice = answer.choices[0]
    if choice.finish_reason == "length":  # a small model may go on for long within a string
        return
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_a_function_without_parameters_is_called_with_nothing(client: OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "now", "description": "The time"}}]
    fields: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = ask(client, MODEL, tools=tools, temperature=1, seed=3, max_tokens=60, **fields)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {}
    create: Any = client.responses.create
    flat = [{"type": "function", "name": "now"}]
    (item,) = create(model=MODEL, input="What time is it?", tools=flat, max_output_tokens=60, **fields).output
    assert item.type == "function_call"
    assert json.loads(item.arguments) == {}


REAL_TOOLS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "real_tools.json").read_text())
"""Schemas in the manner of tools that people give to models."""


@pytest.mark.parametrize("tool", REAL_TOOLS, ids=lambda tool: tool["name"])
def test_arguments_are_those_of_real_tools(client: OpenAI, tool: dict[str, Any]) -> None:
    answer = ask(
        client,
        MODEL,
        messages=[{"role": "user", "content": f"Use {tool['name']}."}],
        tools=[{"type": "function", "function": tool}],
        tool_choice={"type": "function", "function": {"name": tool["name"]}},
        temperature=1,
        seed=1,
        max_tokens=250,
    )
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    if choice.finish_reason != "length":  # a small model may go on for long within a string
        jsonschema.validate(json.loads(call.function.arguments), tool["parameters"])


def test_one_call_where_no_more_are_wanted(client: OpenAI) -> None:
    tools = [TIME]
    answer = ask(client, MODEL, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=60)
    assert [call.function.name for call in answer.choices[0].message.tool_calls or []] == ["get_time"]  # type: ignore[union-attr]


def strict(tool: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    function = tool["function"]
    schema = {**function["parameters"], "additionalProperties": False, **parameters}
    return {"type": "function", "function": {**function, "strict": True, "parameters": schema}}


EAGER: dict[str, Any] = {"logit_bias": {"151657": 100, "198": 50}}
"""Qwen's <tool_call>, and the line break that stands between two calls."""


def test_a_call_is_held_to_a_strict_schema_where_none_has_to_be_made(qwen: OpenAI) -> None:
    properties = {"city": {"const": "Köln"}, "unit": {"enum": ["kelvin"]}}
    choice = ask(qwen, tools=[strict(WEATHER, properties=properties)], max_tokens=120, **EAGER).choices[0]
    assert choice.finish_reason in ("tool_calls", "length")
    calls = choice.message.tool_calls or []
    assert len(calls) > 1
    assert json.loads(calls[0].function.arguments) == {"city": "Köln", "unit": "kelvin"}  # type: ignore[union-attr]


def test_no_second_call_begins_where_one_is_wanted(qwen: OpenAI) -> None:
    for tool in (WEATHER, strict(WEATHER)):
        fields: dict[str, Any] = {"tools": [tool], "parallel_tool_calls": False, "max_tokens": 120, **EAGER}
        choice = ask(qwen, **fields).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[union-attr]
        content, calls, _ = streamed(qwen, **fields)
        assert not content
        assert calls == [{"name": "get_weather", "arguments": call.function.arguments}]  # type: ignore[union-attr]


def test_who_does_not_call_says_what_it_would(qwen: OpenAI) -> None:
    begun: Any = [{"role": "user", "content": "What is the capital of France?"}]
    begun.append({"role": "assistant", "content": "Of course I know that. The capital of France"})
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    create: Any = qwen.chat.completions.create
    unheld, held = (
        create(
            model=QWEN,
            messages=begun,
            tools=[TIME],
            temperature=0,
            max_tokens=24,
            parallel_tool_calls=several,
            extra_body=goes_on,
        )
        for several in (True, False)
    )
    assert "Paris" in held.choices[0].message.content
    assert held.choices[0].message == unheld.choices[0].message


def test_a_call_that_is_cut_leaves_no_marks(qwen: OpenAI) -> None:
    for max_tokens in range(1, 9):
        choice = ask(qwen, tools=[strict(WEATHER)], max_tokens=max_tokens, **EAGER).choices[0]
        assert choice.finish_reason == "length"
        assert not choice.message.content


@pytest.mark.parametrize("fields", [{}, {"parallel_tool_calls": False}])
def test_a_schema_that_cannot_be_enforced(qwen: OpenAI, fields: dict[str, Any]) -> None:
    """Is refused where it has to be, and else the answer goes without."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}
    assert ask(qwen, tools=[tool], max_tokens=4, **fields).choices[0].finish_reason == "length"
    tool["function"]["strict"] = True  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="objekt") as refused:
        ask(qwen, tools=[tool], max_tokens=4, **fields)
    assert refused.value.param == "tools"


@pytest.mark.parametrize("mode", ["required", "auto"])
def test_only_the_allowed_tools_are_called(qwen: OpenAI, mode: str) -> None:
    some = {"mode": mode, "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    answer = ask(qwen, tool_choice={"type": "allowed_tools", "allowed_tools": some}, max_tokens=60)
    calls = answer.choices[0].message.tool_calls or []
    assert {call.function.name for call in calls} <= {"get_time"}  # type: ignore[union-attr]
    assert calls or mode == "auto"
    flat: Any = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "get_time"}]}
    tools: Any = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
    wish: Any = {"model": QWEN, "input": ASKED, "tools": tools, "max_output_tokens": 60, "temperature": 0}
    response = qwen.responses.create(**wish, tool_choice=flat)
    names = {item.name for item in response.output if item.type == "function_call"}
    assert names <= {"get_time"}
    assert names or mode == "auto"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
            "allowed_tools",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
            "tool_choice",
            "none of the tools",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice", "none, auto, required"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "both say what the answer looks like",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}],
                "tool_choice": "required",
            },
            "tools",
            "objekt",
        ),
    ],
)
def test_tools_that_are_none(client: OpenAI, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(client, MODEL, **fields)
    assert refused.value.param == param
