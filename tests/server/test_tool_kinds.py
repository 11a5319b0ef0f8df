"""Tools that are no functions, as the endpoints take, serve and word them."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI

from server.api.responses_api.request import turns
from server.parsing.custom_input import CustomCalls
from server.parsing.events import Arguments, CallBegun, merged
from server.parsing.formats import parser_of
from tests.server.conftest import MODEL
from tests.server.serving import Server
from tests.server.test_tools import ASKED, TIME

PATCH: dict[str, Any] = {
    "type": "custom",
    "custom": {
        "name": "apply_patch",
        "description": "Changes files.",
        "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "*** Begin Patch"'}},
    },
}
FLAT_PATCH: dict[str, Any] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Changes files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
}
FLAT_TIME: dict[str, Any] = {"type": "function", **TIME["function"]}
HOSTED: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
    {"type": "mcp", "server_label": "deepwiki", "server_url": "https://mcp.example/", "require_approval": "never"},
    {"type": "image_generation", "output_format": "png"},
    {"type": "computer_use_preview", "display_width": 1, "display_height": 1, "environment": "linux"},
]


def respond(client: OpenAI, **fields: Any) -> Any:
    create: Any = client.responses.create
    return create(**{"model": MODEL, "temperature": 0, "max_output_tokens": 60, "input": "Patch it."} | fields)


def chat(client: OpenAI, **fields: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(**{"model": MODEL, "temperature": 0, "max_tokens": 60, "messages": ASKED} | fields)


# Custom tools -------------------------------------------------------------------------------------------


def test_a_custom_tool_is_called_with_a_text(client: OpenAI) -> None:
    wish: dict[str, Any] = {"tools": [PATCH], "tool_choice": {"type": "custom", "custom": {"name": "apply_patch"}}}
    whole = chat(client, **wish).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.type, call.custom.name) == ("custom", "apply_patch")
    assert call.custom.input
    assert not call.custom.input.startswith("{")
    begun, *pieces = [
        each for chunk in chat(client, stream=True, **wish) for each in chunk.choices[0].delta.tool_calls or []
    ]
    assert (begun.type, begun.custom["name"]) == ("custom", "apply_patch")
    assert "".join(piece.custom["input"] for piece in pieces) == call.custom.input
    messages = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "Done."},
    ]
    assert chat(client, messages=messages, tools=[PATCH]).choices[0].finish_reason


def test_the_model_is_told_of_its_form(client: OpenAI) -> None:
    def length(tool: dict[str, Any]) -> int:
        tokens: int = chat(client, tools=[tool], max_tokens=1).usage.prompt_tokens
        return tokens

    told = length(PATCH)
    described = {"type": "custom", "custom": PATCH["custom"] | {"format": {"type": "text"}}}
    assert told > length(described) + 8
    function = {
        "name": "apply_patch",
        "description": "Changes files.",
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
            "additionalProperties": False,
        },
    }
    assert length(described) == length({"type": "function", "function": function})


def test_responses_have_items_and_events_of_their_own_for_them(client: OpenAI) -> None:
    wish: dict[str, Any] = {"tools": [FLAT_PATCH], "tool_choice": {"type": "custom", "name": "apply_patch"}}
    response = respond(client, **wish)
    (item,) = response.output
    assert (item.type, item.name) == ("custom_tool_call", "apply_patch")
    assert item.id.startswith("ctc_")
    assert response.tools[0].format.definition == 'start: "*** Begin Patch"'
    events = list(respond(client, stream=True, **wish))
    kinds = [event.type for event in events if event.type != "response.custom_tool_call_input.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.custom_tool_call_input.done",
        "response.output_item.done",
        f"response.{response.status}",
    ]
    pieces = "".join(event.delta for event in events if event.type == "response.custom_tool_call_input.delta")
    assert pieces == events[-3].input == events[-2].item.input == item.input
    output = {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "Done."}
    asked = {"role": "user", "content": "Patch it."}
    assert respond(client, input=[asked, item.model_dump(), output], tools=[FLAT_PATCH]).output


@pytest.mark.parametrize("ascii_only", [False, True])
def test_however_its_json_is_cut_the_input_is_the_same(ascii_only: bool) -> None:
    rng = random.Random(0)
    for text in ('a "b" \\ \n\t {}', "é 😀😀 \u2028", "", "\\u00 \\", "*** Begin Patch\n*** End Patch"):
        call = json.dumps({"name": "f", "arguments": {"input": text}}, ensure_ascii=ascii_only)
        answer = f"<tool_call>\n{call}\n</tool_call>"
        for _ in range(50):
            parser = CustomCalls(parser_of("hermes", ["f"]), {"f"})
            cuts = [0, *sorted(rng.sample(range(len(answer)), rng.randint(0, 12))), len(answer)]
            pieces = [answer[start:end] for start, end in pairwise(cuts)]
            events = merged([event for piece in pieces for event in parser.push(piece)] + parser.finish())
            assert events == [CallBegun(0, "f"), *([Arguments(0, text)] if text else [])]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [('{"input": 12.5}', "12.5"), ('{"x": {"a": ["b"]}, "c": 1}', '{"a": ["b"]}'), ('{"a": "b", "c": "d"}', "b")],
)
def test_what_is_no_text_is_json(arguments: str, said: str) -> None:
    parser = CustomCalls(parser_of("hermes", ["f"]), {"f"})
    events = parser.push(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>') + parser.finish()
    assert merged(events) == [CallBegun(0, "f"), Arguments(0, said)]


# Namespaces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("namespace", "flat"), [("clock", "clock__get_time"), ("mcp__clock__", "mcp__clock__get_time")]
)
def test_a_namespace_is_flattened_and_named_again(client: OpenAI, namespace: str, flat: str) -> None:
    tool = {"type": "namespace", "name": namespace, "description": "Of time", "tools": [FLAT_TIME, FLAT_PATCH]}
    choice = {"type": "function", "namespace": namespace, "name": "get_time"}
    response = respond(client, tools=[tool], tool_choice=choice)
    (item,) = response.output
    assert (item.type, item.namespace, item.name) == ("function_call", namespace, "get_time")
    assert response.tools[0].tools[0].name == "get_time"
    message = turns([item.model_dump()])[0]
    assert message["tool_calls"][0]["function"]["name"] == flat
    custom = respond(client, tools=[tool], tool_choice=choice | {"type": "custom", "name": "apply_patch"}).output[
        0
    ]
    assert (custom.type, custom.namespace, custom.name) == ("custom_tool_call", namespace, "apply_patch")


def test_what_is_wrong_is_named_by_its_own_field(client: OpenAI) -> None:
    many = [{**FLAT_TIME, "name": f"f{place}"} for place in range(200)]
    spaces = [{"type": "namespace", "name": name, "tools": many} for name in ("a", "b")]
    with pytest.raises(BadRequestError, match="there are 400 tools, and 256 are the most") as refused:
        respond(client, tools=spaces)
    assert refused.value.param == "tools"
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    with pytest.raises(BadRequestError, match=r"tool_choice and text\.format both say"):
        respond(client, tools=[FLAT_TIME], tool_choice="required", text={"format": schema})
    with pytest.raises(BadRequestError) as refused:
        respond(client, text={"format": {**schema, "schema": {"type": "nothing"}}})
    assert refused.value.param == "text.format"


# Tools of hosted APIs -----------------------------------------------------------------------------------


async def test_hosted_tools_are_left_out_and_told_of_once(server: Server, client: OpenAI) -> None:
    alone = respond(client, tools=[FLAT_TIME])
    for _ in range(2):
        beside = respond(client, tools=[*HOSTED, FLAT_TIME])
    assert beside.usage.input_tokens == alone.usage.input_tokens
    assert [tool.name for tool in beside.tools] == ["get_time"]
    assert respond(client, tools=HOSTED).usage.input_tokens == respond(client).usage.input_tokens
    assert server.log.count("tools of the kind 'web_search'") == 1
    fields = {"model": MODEL, "messages": ASKED, "max_tokens": 1, "tools": [*HOSTED, TIME]}
    status, answer = await server.post("/v1/chat/completions", fields)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == chat(client, tools=[TIME], max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
        {"type": "code_execution_20260120", "name": "code_execution", "allowed_callers": ["direct"]},
    ],
)
def test_those_of_messages_too(server: Server, tool: Any) -> None:
    own: Any = {"name": "get_time", "input_schema": TIME["function"]["parameters"]}
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
        fields: Any = {"model": MODEL, "messages": ASKED}
        count = claude.messages.count_tokens
        assert count(**fields, tools=[tool, own]).input_tokens == count(**fields, tools=[own]).input_tokens
        assert claude.messages.create(**fields, tools=[tool], max_tokens=1).content


# What a conversation has of them --------------------------------------------------------------------------

CALL = {"id": "x_1", "call_id": "call_1", "status": "completed"}
HISTORY: list[tuple[list[dict[str, Any]], str | None, str | None]] = [
    (
        [
            {"type": "local_shell_call", **CALL, "action": {"type": "exec", "command": ["ls"], "env": {}}},
            {"type": "local_shell_call_output", "id": "x_1", "output": "a.txt"},
        ],
        "local_shell",
        "a.txt",
    ),
    (
        [
            {"type": "shell_call", **CALL, "action": {"commands": ["ls"]}},
            {
                "type": "shell_call_output",
                "call_id": "call_1",
                "output": [{"stdout": "a.txt", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}],
            },
        ],
        "shell",
        "a.txt",
    ),
    (
        [
            {"type": "apply_patch_call", **CALL, "operation": {"type": "delete_file", "path": "a"}},
            {"type": "apply_patch_call_output", "call_id": "call_1", "status": "completed", "output": "gone"},
        ],
        "apply_patch",
        "gone",
    ),
    (
        [
            {"type": "custom_tool_call", "call_id": "call_1", "name": "exec", "input": "print(1)"},
            {
                "type": "custom_tool_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_text", "text": "1"}],
            },
        ],
        "exec",
        "1",
    ),
    (
        [
            {"type": "computer_call", **CALL, "action": {"type": "screenshot"}, "pending_safety_checks": []},
            {
                "type": "computer_call_output",
                "call_id": "call_1",
                "output": {"type": "computer_screenshot", "image_url": "data:image/png;base64,"},
            },
        ],
        "computer",
        "computer_screenshot",
    ),
    (
        [{"type": "mcp_call", "id": "m", "name": "f", "server_label": "s", "arguments": "{}", "output": "7"}],
        "f",
        "7",
    ),
    (
        [{"type": "code_interpreter_call", "id": "c", "code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]}],
        "code_interpreter",
        "2",
    ),
    (
        [{"type": "file_search_call", "id": "f", "queries": ["q"], "results": [{"text": "found"}]}],
        "file_search",
        "found",
    ),
    ([{"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search"}}], None, None),
    ([{"type": "mcp_list_tools", "id": "l", "server_label": "s", "tools": []}], None, None),
    ([{"type": "compaction", "encrypted_content": "abc"}], None, None),
]


@pytest.mark.parametrize(("items", "name", "result"), HISTORY, ids=lambda value: str(value)[:30])
def test_their_items_are_understood(
    client: OpenAI, items: list[dict[str, Any]], name: str | None, result: str | None
) -> None:
    asked = {"role": "user", "content": "Go on."}
    response = respond(client, input=[asked, *items, {"role": "user", "content": "And?"}], max_output_tokens=1)
    assert response.output
    messages = turns(items)
    if name is None:
        assert messages == []
        return
    call, output = messages
    assert call["tool_calls"][0]["function"]["name"] == name
    assert output["role"] == "tool"
    assert result is not None
    assert result in output["content"]


def test_others_are_refused_by_their_name(client: OpenAI) -> None:
    with pytest.raises(Exception, match="type stranger, which is not known here"):
        respond(client, input=[{"type": "stranger"}])
