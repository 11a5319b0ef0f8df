"""/v1/responses, as OpenAI's own client sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from server.api.responses_api.recent import LIFETIME_SECONDS, RecentItems
from tests.server.conftest import MODEL, QWEN
from tests.server.serving import Server
from tests.server.test_tools import TIME, WEATHER
from tests.server.users_server import UsersServer

QUESTION = "What is the capital of France?"
TOOLS: Any = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]


@pytest.fixture(scope="module")
def keeping(dressed_server: Server) -> Iterator[OpenAI]:
    with dressed_server.client() as client:
        yield client


def respond(client: OpenAI, **fields: Any) -> Any:
    create: Any = client.responses.create
    return create(**{"model": MODEL, "temperature": 0, "max_output_tokens": 40} | fields)


def test_a_response_in_one_piece(client: OpenAI) -> None:
    response = respond(client, input=QUESTION)
    assert response.output_text == "The capital of France is Paris."
    assert response.status == "completed"
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
    )
    assert chat.choices[0].message.content == response.output_text, "the same generation"


def test_a_stream_has_openais_events_in_their_order(client: OpenAI) -> None:
    events = list(respond(client, input=QUESTION, stream=True))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == "The capital of France is Paris."
    assert events[-1].response.usage.output_tokens == 8


def test_what_is_cut_short_is_incomplete(client: OpenAI) -> None:
    response = respond(client, input=QUESTION, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = respond(client, input=QUESTION, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_items_and_instructions(client: OpenAI) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Paris.", "annotations": []}],
        },
        {"role": "user", "content": "And of Italy?"},
    ]
    assert "Rome" in respond(client, instructions="Be brief.", input=items).output_text


def test_a_pydantic_model_comes_back(client: OpenAI) -> None:
    class City(BaseModel):
        name: str

    parsed = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=City, temperature=0, max_output_tokens=60
    )
    assert isinstance(parsed.output_parsed, City)


@pytest.fixture(scope="module")
def qwen(qwen_server: Server) -> Iterator[OpenAI]:
    with qwen_server.client() as client:
        yield client


def test_calls_go_out_and_their_outputs_come_back(qwen: OpenAI) -> None:
    asked = {"role": "user", "content": "What is the weather in Paris, in celsius?"}
    fields = {"model": QWEN, "tools": TOOLS, "tool_choice": "required", "max_output_tokens": 80}
    response = respond(qwen, input=[asked], **fields)
    call = response.output[0]
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'}
    fields["tool_choice"] = "none"
    told = respond(qwen, input=[asked, call.model_dump(), output], **fields)
    assert "21" in told.output_text


def test_streamed_calls_are_those_of_the_whole(qwen: OpenAI) -> None:
    fields: dict[str, Any] = {"model": QWEN, "tools": TOOLS, "tool_choice": "required", "max_output_tokens": 80}
    whole = respond(qwen, input="Weather in Paris, celsius?", **fields)
    events = list(respond(qwen, input="Weather in Paris, celsius?", stream=True, **fields))
    pieces = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert pieces == "".join(item.arguments for item in whole.output)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [(item.name, item.arguments) for item in done] == [(item.name, item.arguments) for item in whole.output]


def test_a_response_follows_another_where_they_are_kept(keeping: OpenAI) -> None:
    first = respond(keeping, model="fast", input=QUESTION)
    assert first.store
    assert keeping.responses.retrieve(first.id).output_text == first.output_text
    second = respond(keeping, model="fast", input="And of Italy?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.total_tokens
    *_, last = respond(keeping, model="fast", input="And of Spain?", previous_response_id=second.id, stream=True)
    assert last.response.usage.input_tokens > second.usage.total_tokens
    keeping.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        keeping.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        respond(keeping, model="fast", input="And of Italy?", previous_response_id=first.id)
    assert not respond(keeping, model="fast", input=QUESTION, store=False).store


def test_what_is_kept_may_have_logprobs(keeping: OpenAI) -> None:
    fields = {"model": "fast", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    first = respond(keeping, input=QUESTION, **fields)
    assert len(first.output[0].content[0].logprobs[0].top_logprobs) == 2
    assert keeping.responses.retrieve(first.id).output == first.output
    *_, last = respond(keeping, input="And of Italy?", previous_response_id=first.id, stream=True, **fields)
    assert keeping.responses.retrieve(last.response.id).output == last.response.output


def test_where_they_are_not_it_is_said(client: OpenAI) -> None:
    assert not respond(client, input=QUESTION, max_output_tokens=1).store
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}):
        with pytest.raises(openai.BadRequestError, match="--store FILE"):
            respond(client, input=QUESTION, **fields)
    with pytest.raises(openai.NotFoundError, match="--store FILE"):
        client.responses.retrieve("resp_1")


def test_an_image_that_was_seen_before_is_said_to_be_there(client: OpenAI) -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 100_000}
    after = [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    said = {"role": "user", "content": "[input_image: this model reads text only]"}
    num_tokens = respond(client, input=[{"role": "user", "content": [image]}, *after]).usage.input_tokens
    assert num_tokens == respond(client, input=[said, *after]).usage.input_tokens
    call = {"type": "function_call", "call_id": "x", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "x", "output": [image]}
    assert respond(client, input=[{"role": "user", "content": "Look."}, call, output]).output


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
        ),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "functoin", "name": "f"}]}, "tools[0].type"),
        ({"input": "a", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"input": "word " * 9000}, "input"),
    ],
)
async def test_what_it_cannot_do(server: Server, fields: dict[str, Any], param: str) -> None:
    status, answer = await server.post("/v1/responses", fields)
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize("kept", [False, True])
def test_items_of_earlier_answers_may_only_be_named(client: OpenAI, keeping: OpenAI, kept: bool) -> None:
    server, model = (keeping, "fast") if kept else (client, MODEL)
    asks: dict[str, Any] = {"model": model, "input": [{"role": "user", "content": QUESTION}]}
    (item,) = (first := respond(server, **asks)).output
    again: Any = [{"role": "user", "content": "And of Italy?"}]
    named = [*asks["input"], {"type": "item_reference", "id": item.id}, *again]
    said = [*asks["input"], {"role": "assistant", "content": first.output_text}, *again]
    by_name = respond(server, model=model, input=named)
    assert by_name.usage.input_tokens == respond(server, model=model, input=said).usage.input_tokens
    (streamed,) = [
        event.item for event in respond(server, **asks, stream=True) if event.type.endswith("item.done")
    ]
    assert respond(server, model=model, input=[{"id": streamed.id}, *again]).output_text
    silent = respond(server, **asks, store=False).output[0].id
    for unknown in ("x", item.id[:-1] + "f", f"msg_{'0' * 32}0", silent):
        with pytest.raises(openai.NotFoundError, match="there is no item") as refused:
            respond(server, model=model, input=[{"type": "item_reference", "id": unknown}, *again])
        assert refused.value.param == "input"


def test_items_are_their_users_own(users_server: UsersServer) -> None:
    url = f"{users_server.url}/v1"
    with (
        OpenAI(base_url=url, api_key=users_server.keys["alice"]) as alice,
        OpenAI(base_url=url, api_key=users_server.keys["bob"]) as bob,
    ):
        (item,) = respond(alice, input=QUESTION, max_output_tokens=4).output
        named: Any = [{"type": "item_reference", "id": item.id}, {"role": "user", "content": "Go on"}]
        assert respond(alice, input=named, max_output_tokens=4).output
        with pytest.raises(openai.NotFoundError, match="there is no item"):
            respond(bob, input=named, max_output_tokens=4)


def test_what_is_kept_in_memory_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def items(number: int) -> list[dict[str, Any]]:
        return [{"id": f"{number}", "text": "x" * 90}]

    recent = RecentItems(max_bytes=1000)
    recent.keep("bob", "resp_b", items(0))
    for number in range(30):
        recent.keep("alice", f"resp_{number}", items(number))
    assert [number for number in range(30) if recent.find("alice", f"resp_{number}")] == [*range(23, 30)]
    assert recent.find("bob", "resp_b") == items(0), "a flood pushes out its own"
    assert recent.find("bob", "resp_29") is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + LIFETIME_SECONDS + 1)
    assert recent.find("bob", "resp_b") is None
    recent.keep("carol", "resp_c", items(1))
    assert recent.find("carol", "resp_c") == items(1)
    assert recent.num_bytes == len(json.dumps(items(1), separators=(",", ":")))


def test_what_was_said_before_a_response_is_listed(keeping: OpenAI) -> None:
    first = respond(keeping, model="fast", input=QUESTION)
    second = respond(keeping, model="fast", input="And of Italy?", previous_response_id=first.id)
    listed: Any = keeping.responses.input_items.list
    page = listed(second.id)
    assert [item.type for item in page.data] == ["message"] * 3
    texts = [item.content[0].text for item in page.data]
    assert texts == ["And of Italy?", first.output_text, QUESTION]
    assert [item.role for item in page.data] == ["user", "assistant", "user"]
    ids = [item.id for item in page.data]
    assert ids[1] == first.output[0].id
    asked = listed(second.id, limit=1, order="asc")
    assert [item.id for item in asked] == ids[::-1], "page by page"
    assert asked.has_more
    with pytest.raises(openai.NotFoundError):
        listed("resp_none")
    for query in ({"limit": 0}, {"limit": 101}, {"after": "x"}):
        with pytest.raises(openai.BadRequestError):
            listed(second.id, **query)


@pytest.mark.prove
def test_the_oldest_turns_are_left_out_if_asked_for(client: OpenAI) -> None:
    turns = [
        {"role": role, "content": f"{number} " + "word " * 700}
        for number in range(12)
        for role in ("user", "assistant")
    ]
    asks: dict[str, Any] = {"instructions": "Be brief.", "max_output_tokens": 8}
    last = {"role": "user", "content": QUESTION}
    with pytest.raises(openai.BadRequestError, match="context length"):
        respond(client, input=[*turns, last], **asks)
    cut = respond(client, input=[*turns, last], truncation="auto", **asks)
    assert cut.truncation == "auto"
    fitting = next(
        kept
        for first in range(0, len(turns), 2)
        if (kept := respond_if_it_fits(client, input=[*turns[first:], last], **asks)) is not None
    )
    assert cut.usage.input_tokens == fitting.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="context length"):
        respond(client, input="word " * 9000, truncation="auto")


def respond_if_it_fits(client: OpenAI, **fields: Any) -> Any:
    try:
        return respond(client, **fields)
    except openai.BadRequestError:
        return None


def test_the_deltas_have_the_logprobs_of_their_tokens(client: OpenAI) -> None:
    events = list(respond(client, input=QUESTION, stream=True, top_logprobs=2))
    told = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [each.token for each in told] == [each.token for each in done.logprobs][: len(told)]
    assert "".join(each.token for each in told).startswith(done.text)
    assert all(len(each.top_logprobs) == 2 for each in told)


def test_more_of_what_chats_have(client: OpenAI) -> None:
    more = {"stop": [" of"], "chat_template_kwargs": {"mood": "sad"}}
    answer = respond(client, input=QUESTION, extra_body=more)
    assert answer.output_text == "The capital"


def test_the_file_is_its_owners_only(keeping: OpenAI, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, *_ = Path(tmp_path_factory.getbasetemp()).glob("dressed*/responses.sqlite3")
    assert file.stat().st_mode & 0o077 == 0
