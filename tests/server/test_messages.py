"""/v1/messages, as Anthropic's own client sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from openai import OpenAI

from scheduler.text.tokenizer import Tokenizer
from server.api.messages_api.request import MessagesRequest
from tests.server.conftest import MODEL, QWEN
from tests.server.serving import Server
from tests.server.test_tools import WEATHER
from tests.server.users_server import UsersServer

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
TOOLS: Any = [
    {"name": "get_weather", "description": "The weather", "input_schema": WEATHER["function"]["parameters"]}
]


def client_of(server: Server, key: str = "none") -> Anthropic:
    return Anthropic(base_url=server.url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[Anthropic]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def qwen(qwen_server: Server) -> Iterator[Anthropic]:
    with client_of(qwen_server) as client:
        yield client


def ask(client: Anthropic, **fields: Any) -> Any:
    """Temperature is none of this client's parameters any more."""
    create: Any = client.messages.create
    extra = {"temperature": fields.pop("temperature", 0)}
    return create(**{"model": MODEL, "messages": QUESTION, "max_tokens": 40, "extra_body": extra} | fields)


def test_an_answer_in_one_piece(claude: Anthropic) -> None:
    message = ask(claude)
    (block,) = message.content
    assert block.text == "The capital of France is Paris."
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 8
    assert ask(claude, max_tokens=3).stop_reason == "max_tokens"
    stopped = ask(claude, stop_sequences=[" of"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " of")
    assert stopped.content[0].text == "The capital"


def test_what_the_cache_takes_in_is_told_where_that_is_asked_for(claude: Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Rivers and lakes. " * 20, "cache_control": {"type": "ephemeral"}}]
    plain = ask(claude, system="Mountains and hills. " * 20, max_tokens=1).usage
    assert plain.input_tokens > 60
    assert plain.cache_creation_input_tokens == 0
    first, second = (ask(claude, system=system, max_tokens=1).usage for _ in range(2))
    assert first.cache_creation_input_tokens > 60
    whole = first.cache_creation_input_tokens + first.cache_read_input_tokens
    assert second.cache_read_input_tokens >= whole - 16  # the last block may be computed again, for its logits
    assert second.cache_creation_input_tokens + second.cache_read_input_tokens == whole
    for usage in (first, second):
        assert usage.input_tokens < 16


def test_a_stream_has_their_events_in_their_order(claude: Anthropic) -> None:
    events = list(ask(claude, stream=True))
    assert [event.type for event in events if event.type != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.usage.input_tokens > 0
    with claude.messages.stream(model=MODEL, messages=QUESTION, max_tokens=40, extra_body=GREEDY) as stream:
        assert stream.get_final_text() == "The capital of France is Paris."


def test_systems_and_blocks(claude: Anthropic, tokenizer: Tokenizer) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Paris."}]},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert "Rome" in ask(claude, system=system, messages=messages).content[0].text
    counted = claude.messages.count_tokens(model=MODEL, system=system, messages=messages)
    same = [{"role": "system", "content": "Be brief."}, *messages]
    same[1] = {"role": "user", "content": "What is the capital of France?"}
    same[2] = {"role": "assistant", "content": "Paris."}
    assert counted.input_tokens == len(tokenizer.apply_chat_template(same))


def test_tools_there_and_back(qwen: Anthropic) -> None:
    asked: Any = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    fields: dict[str, Any] = {"model": QWEN, "tools": TOOLS, "max_tokens": 80}
    message = ask(qwen, messages=asked, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **fields)
    call = message.content[0]
    assert message.stop_reason == "tool_use"
    assert (call.type, call.name) == ("tool_use", "get_weather")
    assert call.input["city"]
    with qwen.messages.stream(
        messages=asked, tool_choice={"type": "tool", "name": "get_weather"}, extra_body=GREEDY, **fields
    ) as stream:
        streamed = stream.get_final_message().content[0]
    assert streamed.type == "tool_use"
    assert streamed.input["city"]
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": '{"degrees": 21}'}],
    }
    messages = [
        *asked,
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    told = ask(qwen, messages=messages, tool_choice={"type": "none"}, **fields)
    assert "21" in told.content[0].text


def conversation(*turns: tuple[str, Any]) -> Any:
    return [{"role": role, "content": content} for role, content in turns]


def count(client: Anthropic, messages: Any, **fields: Any) -> int:
    tokens: int = client.messages.count_tokens(model=MODEL, messages=messages, **fields).input_tokens
    return tokens


# What turns are made of -----------------------------------------------------------------------------------


def test_an_answer_goes_on_with_the_last_turn(claude: Anthropic) -> None:
    prefilled = conversation(("user", QUESTION[0]["content"]), ("assistant", "The capital of France is"))
    assert ask(claude, messages=prefilled).content[0].text == " Paris."
    in_blocks = conversation(
        ("user", QUESTION[0]["content"]), ("assistant", [{"type": "text", "text": "The capital of"}])
    )
    assert ask(claude, messages=in_blocks).content[0].text == " France is Paris."
    with claude.messages.stream(model=MODEL, messages=prefilled, max_tokens=40, extra_body=GREEDY) as stream:
        assert stream.get_final_text() == " Paris."


def test_behind_a_call_an_answer_begins_anew(claude: Anthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}
    messages = conversation(("user", "Hi"), ("assistant", [{"type": "text", "text": "Let me look."}, call]))
    assert ask(claude, messages=messages, tools=TOOLS, max_tokens=2).content


PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
TEXT = {"type": "text", "media_type": "text/plain", "data": "Kaunas is in Lithuania."}
PARTS = {"type": "content", "content": [{"type": "text", "text": "Kaunas is"}, {"type": "text", "text": "here."}]}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 100_000}}
FOUND: Any = {
    "type": "search_result",
    "source": "https://kaunas.example",
    "title": "Kaunas",
    "content": [{"type": "text", "text": "A city."}],
}


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "document", "source": TEXT}, "Kaunas is in Lithuania."),
        (
            {"type": "document", "title": "Cities", "context": "Old", "source": TEXT},
            "Cities\nOld\n" + TEXT["data"],
        ),
        ({"type": "document", "source": PARTS}, "Kaunas is\nhere."),
        (FOUND, "Kaunas\nhttps://kaunas.example\nA city."),
        ({"type": "tool_reference", "tool_name": "get_weather"}, "get_weather"),
    ],
)
def test_blocks_that_have_text_are_text(claude: Anthropic, block: Any, text: str) -> None:
    for role in ("user", "assistant"):
        turns = conversation(("user", "Hi"), (role, [block]), ("user", "And?"))
        assert count(claude, turns) == count(claude, conversation(("user", "Hi"), (role, text), ("user", "And?")))
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}

    def result(content: Any) -> Any:
        told = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}
        return conversation(("user", "Hi"), ("assistant", [call]), ("user", [told]))

    assert count(claude, result([block])) == count(claude, result(text))


UNREAD = "[{}: this model reads text only]"


@pytest.mark.parametrize("block", [IMAGE, {"type": "document", "source": PDF}, {"type": "container_upload"}])
def test_what_cannot_be_read_is_said_to_be_there_unless_it_is_the_question(claude: Anthropic, block: Any) -> None:
    said = UNREAD.format(block["type"])
    turns = conversation(("user", [block]), ("assistant", "A cat."), ("user", "Sure?"))
    same = conversation(("user", said), ("assistant", "A cat."), ("user", "Sure?"))
    assert count(claude, turns) == count(claude, same)
    call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    seen = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [block]}
    assert count(claude, conversation(("user", "Hi"), ("assistant", [call]), ("user", [seen])))
    question = [{"type": "text", "text": "What is it?"}, block]
    with pytest.raises(anthropic.BadRequestError, match=f"of type {block['type']}: this model reads text only"):
        count(claude, conversation(("user", question)))


SEARCH: Any = [
    {"type": "text", "text": "I look."},
    {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "Kaunas"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "srv_1",
        "content": [{"type": "web_search_result", "title": "Kaunas", "url": "https://k.example"}],
    },
    {"type": "text", "text": "It is a city."},
]
RUN: Any = [
    {"type": "server_tool_use", "id": "srv_1", "name": "code_execution", "input": {"code": "1+1"}},
    {
        "type": "code_execution_tool_result",
        "tool_use_id": "srv_1",
        "content": {"type": "code_execution_result", "stdout": "2", "stderr": "", "return_code": 0},
    },
]


def test_what_servers_tools_did_is_understood() -> None:
    def messages(content: Any) -> list[dict[str, Any]]:
        turns = conversation(("user", "Hi"), ("assistant", content), ("user", "And?"))
        body = MessagesRequest.model_validate({"messages": turns, "max_tokens": 1})
        return list(body.ask().messages)

    _, called, found, said, _ = messages(SEARCH)
    assert called["content"] == "I look."
    assert called["tool_calls"][0]["function"] == {"name": "web_search", "arguments": {"query": "Kaunas"}}
    assert (found["role"], found["content"]) == ("tool", "Kaunas\nhttps://k.example")
    assert (said["role"], said["content"]) == ("assistant", "It is a city.")
    _, _, ran, _ = messages(RUN)
    assert json.loads(ran["content"])["stdout"] == "2"
    assert len(messages([{"type": "compaction", "content": "x"}, {"type": "text", "text": "Yes."}])) == 3


def test_a_failed_call_is_told_as_one(claude: Anthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}

    def result(text: str, **fields: Any) -> Any:
        told = {"type": "tool_result", "tool_use_id": "toolu_1", "content": text, **fields}
        return conversation(("user", "Hi"), ("assistant", [call]), ("user", [told]))

    assert count(claude, result("no such file", is_error=True)) == count(claude, result("Error: no such file"))
    assert count(claude, result("Error: no file", is_error=True)) == count(claude, result("Error: no file"))
    turns = result("no", is_error=True)
    ask = MessagesRequest.model_validate({"messages": turns, "max_tokens": 1}).ask()
    assert ask.messages[-1]["is_error"] is True


BILLING = "x-anthropic-billing-header: cc_version=2.1.{}; cc_entrypoint=cli; cch={:05x};"


def test_a_billing_line_is_no_part_of_the_prompt(claude: Anthropic) -> None:
    """So that what follows it is found in the prefix cache, whatever the session."""
    rules = "Answer in one word, and do as you are told. " * 20
    plain: Any = [{"type": "text", "text": rules}]
    without = ask(claude, system=plain, max_tokens=1)
    num_tokens = without.usage.input_tokens + without.usage.cache_read_input_tokens
    for session in range(2):
        line = {"type": "text", "text": BILLING.format(session, session + 77)}
        answer = ask(claude, system=[line, *plain], max_tokens=1)
        assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == num_tokens
        assert answer.usage.cache_read_input_tokens > num_tokens * 0.8
    for system in (f"{line['text']}\n{rules}", [{"type": "text", "text": f"{line['text']}\n\n{rules}"}]):
        assert count(claude, QUESTION, system=system) == count(claude, QUESTION, system=rules)
    late = conversation(("user", "Hi"), ("system", [line, *plain]), ("user", "And?"))
    assert count(claude, late) == count(claude, conversation(("user", "Hi"), ("system", rules), ("user", "And?")))
    said = conversation(("user", f"{line['text']}\nWhat is this?"))
    assert count(claude, said) > count(claude, conversation(("user", "What is this?"))) + 10, (
        "who says it is heard"
    )


# Errors and models ----------------------------------------------------------------------------------------

BROKEN: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [5]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "stranger"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{}]}]}]},
    {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": 5}]}]},
    {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
    {"messages": [{"role": "waiter", "content": "a"}]},
    {"messages": QUESTION, "system": 5},
    {"messages": QUESTION, "system": [{"type": "image"}]},
    {"messages": QUESTION, "tools": [{"name": "a b"}]},
    {"messages": QUESTION, "tools": [{"name": "f", "input_schema": 5}]},
    {"messages": QUESTION, "tools": [{"name": "f", "type": "costum"}]},
    {"messages": QUESTION, "tool_choice": {"type": "tool", "name": "f"}},
    {"messages": QUESTION, "tool_choice": {"type": "any"}},
    {"messages": QUESTION, "stop_sequences": "a"},
    {
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": {"type": "any"},
        "output_config": {"format": {"type": "json_schema", "schema": {}}},
    },
]
INNER = re.compile(
    r"Block\b|Text\w+\.|\.str\b|list\[|function-|union\[|constrained|literal\[|tool_calls|response_format|function\."
)
"""What pydantic calls things, and what the chat's request does."""


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: str(body)[-60:])
async def test_what_is_wrong_is_told_in_their_words(server: Server, body: dict[str, Any]) -> None:
    status, answer = await server.post("/v1/messages", {"model": MODEL, "max_tokens": 4} | body)
    assert status == 400, answer
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert not INNER.search(answer["error"]["message"]), answer


async def test_every_path_of_theirs_has_their_envelope(server: Server, users_server: UsersServer) -> None:
    for status, answer in (
        await server.post("/v1/messages", b"{"),
        await server.post("/v1/messages/count_tokens", {"messages": []}),
        await server.get("/v1/messages"),
        await server.get("/v1/messages/nothing"),
        await server.post("/v1/messages/batches", {}),
        await users_server.post("/v1/messages", {}),
        await users_server.get("/v1/messages/count_tokens"),
    ):
        assert status in (400, 401, 404, 405)
        assert set(answer) == {"type", "error", "request_id"}, answer
        kinds = {401: "authentication_error", 404: "not_found_error"}
        assert answer["error"]["type"] == kinds.get(status, "invalid_request_error")
    status, answer = await users_server.post("/v1/chat/completions", {})
    assert answer["error"]["code"] == "invalid_api_key", "OpenAI's has its own"


def test_models_are_listed_for_both(claude: Anthropic, client: OpenAI, users_server: UsersServer) -> None:
    page = claude.models.list(limit=20)
    (model,) = page.data
    assert (model.id, model.type, model.display_name, model.lifecycle) == (MODEL, "model", MODEL, "active")
    assert model.created_at.year > 2020
    assert model.max_input_tokens == 8192
    assert [each.id for each in page] == [MODEL], "there is no second page"
    assert claude.models.retrieve(MODEL) == model
    assert client.models.list().data[0].id == MODEL
    with client_of(users_server, "wrong") as stranger, pytest.raises(anthropic.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_errors_in_their_words(claude: Anthropic, users_server: UsersServer) -> None:
    with pytest.raises(anthropic.BadRequestError, match="invalid_request_error") as refused:
        ask(claude, temperature=-1)
    assert refused.value.body["type"] == "error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        claude.models.retrieve("claude-1")
    image: Any = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]
    with pytest.raises(anthropic.BadRequestError, match="reads text only"):
        ask(claude, messages=[{"role": "user", "content": image}])
    with client_of(users_server, "wrong") as stranger, pytest.raises(anthropic.AuthenticationError):
        ask(stranger)


def test_their_header_carries_the_key(users_server: UsersServer) -> None:
    with client_of(users_server, users_server.keys["alice"]) as alice:
        assert ask(alice).content[0].text
