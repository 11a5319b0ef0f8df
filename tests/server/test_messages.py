"""/v1/messages, as Anthropic's own client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from scheduler.text.tokenizer import Tokenizer
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
