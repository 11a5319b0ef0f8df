"""llama.cpp's own API: /completion, /infill, and what its programs ask about the model."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from scheduler.text.tokenizer import Tokenizer
from tests.server.conftest import MODEL
from tests.server.serving import Json, Server

PROMPT = "The capital of France is"


async def events(server: Server, body: Json) -> list[Json]:
    async with aiohttp.ClientSession() as session, session.post(server.url + "/completion", json=body) as response:
        text = await response.text()
    said = [line.removeprefix("data: ") for line in text.splitlines() if line and not line.startswith(":")]
    return [json.loads(each) for each in said]


async def test_a_stream_says_what_the_whole_says(server: Server) -> None:
    body: Json = {"prompt": PROMPT, "n_predict": 6, "temperature": 0, "return_tokens": True}
    status, whole = await server.post("/completion", body)
    assert status == 200
    pieces = await events(server, body | {"stream": True})
    assert whole["content"].startswith(" Paris")
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for ended in (whole, pieces[-1]):
        assert (ended["stop_type"], ended["tokens_predicted"]) == ("limit", 6)
        assert ended["timings"]["predicted_n"] == 6


async def test_prompts_are_texts_tokens_or_both(server: Server, model_path: str) -> None:
    tokens = Tokenizer(model_path).encode(PROMPT)
    rest: Json = {"n_predict": 3, "temperature": 0}
    said = []
    for prompt in (PROMPT, tokens, [*tokens[:2], Tokenizer(model_path).decode(tokens[2:])]):
        status, answer = await server.post("/completion", rest | {"prompt": prompt})
        assert status == 200
        said.append(answer["content"])
    assert said[0] == said[1] == said[2]
    several: Any
    _, several = await server.post("/completion", rest | {"prompt": [PROMPT, "One two three"]})
    assert [each["index"] for each in several] == [0, 1]
    assert several[0]["content"] == said[0]


async def test_an_answer_ends_at_a_word_or_by_itself(server: Server) -> None:
    _, stopped = await server.post(
        "/completion", {"prompt": PROMPT, "n_predict": 20, "temperature": 0, "stop": ["."], "n_probs": 2}
    )
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", ".")
    assert len(stopped["completion_probabilities"][0]["top_logprobs"]) == 2
    _, worded = await server.post("/apply-template", {"messages": [{"role": "user", "content": "Say yes."}]})
    _, ended = await server.post("/completion", {"prompt": worded["prompt"], "temperature": 0, "n_predict": 100})
    assert ended["stop_type"] == "eos"


async def test_the_text_between_two(qwen_server: Server, server: Server) -> None:
    body = {
        "input_prefix": "def add(a, b):\n  return ",
        "input_suffix": "\n\nprint(add(1, 2))",
        "n_predict": 8,
    }
    status, answer = await qwen_server.post("/infill", body | {"temperature": 0})
    assert status == 200
    assert "a + b" in answer["content"]
    status, refused = await server.post("/infill", body)
    assert status == 400
    assert "no tokens to fill in the middle" in refused["error"]["message"]


async def test_what_programs_ask_and_what_is_wrong(server: Server) -> None:
    _, props = await server.get("/props")
    assert props["model_alias"] == MODEL
    assert props["total_slots"] > 0
    assert props["default_generation_settings"]["n_ctx"] > 0
    for body in (
        {"prompt": {"a": 1}},
        {"prompt": [1.5]},
        {"prompt": [True]},
        {"prompt": [[5, True]]},
        {"prompt": [2**40]},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "echo": True},
        {},
    ):
        status, said = await server.post("/completion", body)
        assert status == 400
        assert said["error"]["message"]
