"""Ollama's API: lines of JSON, its options, and what its programs ask about a model."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from scheduler.core.request import FinishReason
from server.api import generation
from server.http import sse
from tests.server.conftest import MODEL, QWEN
from tests.server.scripted import ScriptedEngine, serving, token
from tests.server.serving import Json, Server
from tests.server.test_tools import WEATHER
from tests.server.users_server import UsersServer

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
OPTIONS = {"temperature": 0, "num_predict": 30}


async def lines(server: Server, path: str, body: Json) -> list[Json]:
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        return [json.loads(line) async for line in response.content]


async def test_a_stream_is_lines_and_says_what_the_whole_says(server: Server) -> None:
    body: Json = {"model": MODEL, "messages": QUESTION, "options": OPTIONS}
    *pieces, last = await lines(server, "/api/chat", body)
    status, whole = await server.post("/api/chat", body | {"stream": False})
    assert status == 200
    assert "".join(piece["message"]["content"] for piece in pieces) == whole["message"]["content"]
    assert whole["message"] == {"role": "assistant", "content": "The capital of France is Paris."}
    for ended in (last, whole):
        assert (ended["done"], ended["done_reason"], ended["eval_count"]) == (True, "stop", 8)
        assert ended["total_duration"] >= ended["prompt_eval_duration"] > 0
        assert ended["prompt_eval_count"] > 8
    assert not any(piece["done"] for piece in pieces)


async def test_a_prompt_is_what_a_user_says_or_with_raw_is_continued(server: Server) -> None:
    asked = {"prompt": QUESTION[0]["content"], "stream": False, "options": OPTIONS}
    _, answer = await server.post("/api/generate", asked)
    assert answer["response"] == "The capital of France is Paris."
    raw = {"prompt": "The capital of France is", "raw": True, "options": OPTIONS | {"num_predict": 1}}
    *_, last = pieces = await lines(server, "/api/generate", raw)
    assert "".join(piece["response"] for piece in pieces) == " Paris"
    assert last["done_reason"] == "length"
    _, system = await server.post("/api/generate", asked | {"system": "Answer with one word."})
    assert system["prompt_eval_count"] != answer["prompt_eval_count"]


async def test_asking_nothing_loads_the_model(server: Server) -> None:
    for path, body in (("/api/generate", {"model": MODEL}), ("/api/chat", {"model": MODEL, "messages": []})):
        status, answer = await server.post(path, body | {"stream": False, "keep_alive": "5m"})
        assert (status, answer["done"], answer["done_reason"], answer["eval_count"]) == (200, True, "load", 0)


@pytest.mark.parametrize(
    "form", ["json", {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}]
)
async def test_an_answer_has_the_form_that_is_asked_for(server: Server, form: Any) -> None:
    body = {
        "messages": QUESTION,
        "format": form,
        "stream": False,
        "options": {"temperature": 0, "num_predict": 200},
    }
    _, answer = await server.post("/api/chat", body)
    if answer["done_reason"] == "stop":
        said = json.loads(answer["message"]["content"])
        assert form == "json" or said["n"] == 7
    status, refused = await server.post("/api/chat", body | {"format": "xml"})
    assert status == 400
    assert refused["error"].startswith('format should be "json", or a JSON schema')


async def test_a_call_comes_whole(qwen_server: Server) -> None:
    asked: Json = {
        "model": QWEN,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "options": {"temperature": 0, "num_predict": 80},
    }
    pieces = await lines(qwen_server, "/api/chat", asked)
    (call,) = [call for piece in pieces for call in piece["message"].get("tool_calls", ())]
    assert call["function"]["name"] == "get_weather"
    assert "Paris" in json.dumps(call["function"]["arguments"])
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_name": "get_weather", "content": "sunny, 21 degrees"}
    followed = asked | {"messages": [*asked["messages"], said, result], "stream": False}
    status, answer = await qwen_server.post("/api/chat", followed)
    assert (status, answer["done"]) == (200, True)
    assert answer["prompt_eval_count"] > pieces[-1]["prompt_eval_count"] + 10, "it has read the result"


async def test_embeddings(server: Server) -> None:
    _, one = await server.post("/api/embed", {"model": MODEL, "input": "a river"})
    _, two = await server.post("/api/embed", {"model": MODEL, "input": ["a river", "a sea " * 20_000]})
    assert one["embeddings"][0] == pytest.approx(two["embeddings"][0])
    assert sum(number**2 for number in two["embeddings"][1]) == pytest.approx(1, abs=1e-3)
    status, refused = await server.post("/api/embed", {"input": "a sea " * 20_000, "truncate": False})
    assert status == 400
    assert "maximum context length" in refused["error"] or "longer" in refused["error"]


async def test_what_programs_ask_about_the_model(server: Server) -> None:
    _, tags = await server.get("/api/tags")
    assert tags["models"][0]["model"] == MODEL
    _, shown = await server.post("/api/show", {"model": MODEL})
    assert "completion" in shown["capabilities"]
    assert shown["model_info"]["carousel.context_length"] > 0
    assert (await server.get("/api/version"))[1]["version"].count(".") == 2


async def test_what_is_wrong_is_told_in_its_words(server: Server) -> None:
    for path, body in (
        ("/api/chat", {"messages": QUESTION, "options": {"temperature": -1}}),
        ("/api/chat", {"messages": [{"role": "user", "content": "what is it?", "images": ["iVBORw0KGgo="]}]}),
        ("/api/generate", {"prompt": 5}),
        ("/api/generate", {"prompt": "a", "raw": True, "think": True}),
        ("/api/generate", {"prompt": ["a", "b"], "raw": True}),
        ("/api/generate", {"prompt": "a", "raw": True, "best_of": 2}),
        ("/api/chat", {"messages": QUESTION, "n": 2}),
        ("/api/chat", {"messages": QUESTION, "explain": True}),
        ("/api/nothing", {}),
    ):
        status, said = await server.post(path, body)
        assert status in (400, 404)
        assert list(said) == ["error"]
        assert isinstance(said["error"], str)


async def test_users_need_their_keys(users_server: UsersServer) -> None:
    status, said = await users_server.post("/api/chat", {"messages": QUESTION})
    assert status == 401
    assert "needs a key" in said["error"]


async def test_nothing_comes_between_the_lines_however_long_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody looks again and again whether it is time for something."""
    monkeypatch.setattr(sse, "PULSE_SECONDS", 0.01)
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.01)
    sleeps = 0
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        nonlocal sleeps
        sleeps += 1
        await sleep(seconds)

    waits = asyncio.Event()
    engine = ScriptedEngine(waits, token("Paris", finish_reason=FinishReason.STOP))
    engine.tokenizer = SimpleNamespace(longest_token=16, encode=lambda text, *_, **__: [7] * len(text))
    body = {"prompt": "a", "raw": True}
    async with serving(engine) as client, client.post("/api/generate", json=body) as response:
        monkeypatch.setattr(asyncio, "sleep", counted)
        await sleep(0.2)
        monkeypatch.undo()
        waits.set()
        said = [json.loads(line) async for line in response.content]
    assert [piece["response"] for piece in said] == ["Paris", ""]
    assert sleeps < 20
