"""Fields that are not known here: left out and named, mapped where they mean one of ours, refused if misspelt."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from scheduler.core.request import FinishReason
from server.api.chat_request import ChatRequest
from server.api.reading import names_of, nearest
from server.http.record import MAX_IGNORED
from server.once import Once
from tests.server.scripted import ScriptedEngine, serving, token
from tests.server.serving import Json, Server
from tests.server.test_bodies import Tokenizer

HEADER = "X-Carousel-Ignored"
CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
HI = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, Json] = {
    CHAT: {"messages": HI, "max_tokens": 1},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    MESSAGES: {"messages": HI, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HI},
    RESPONSES: {"input": "Hi", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
}


async def asked(server: Server, path: str, body: Json) -> tuple[int, str | None, Json]:
    """The status, what the header says was left out, and the answer."""
    async with aiohttp.ClientSession(server.url) as session, session.post(path, json=body) as response:
        return response.status, response.headers.get(HEADER), await response.json()


@pytest.mark.parametrize("path", BODIES)
async def test_they_are_left_out_and_named_on_every_endpoint(server: Server, path: str) -> None:
    assert (await asked(server, path, BODIES[path]))[:2] == (200, None)
    unknown = {"keep_alive": "5m", "client_metadata": {"a": 1}, "provider": {"order": []}, "cache_prompt": True}
    status, ignored, answer = await asked(server, path, BODIES[path] | unknown)
    assert status == 200, answer
    assert ignored == "keep_alive, client_metadata, provider, cache_prompt"
    await server.until_logged("requests have the field client_metadata, which is not known here and left out")


@pytest.mark.parametrize(
    ("path", "fields", "ignored"),
    [
        (CHAT, {"stream_options": {"with_usage": True}, "stream": False}, None),
        (CHAT, {"response_format": {"type": "text", "colour": 1}}, "response_format.colour"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}] * 2},
            "messages[].content[].cache_control",
        ),
        (
            CHAT,
            {"tools": [{"type": "function", "function": {"name": "f", "returns": {}}, "defer_loading": True}]},
            "tools[].defer_loading, tools[].function.returns",
        ),
        (CHAT, {"options": {"num_ctx": 4096, "temperature": 0}}, "options.num_ctx"),
        (CHAT, {"think": 7}, "think"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": "a", "phase": "x"}], "text": {"colour": 1}},
            "input[].phase, text.colour",
        ),
        (MESSAGES, {"thinking": {"type": "disabled", "display": "none"}}, "thinking.display"),
    ],
)
async def test_at_every_depth(server: Server, path: str, fields: Json, ignored: str | None) -> None:
    if ignored is None:  # a field that goes with a stream is refused without one, whatever it has
        status, said, answer = await asked(server, path, BODIES[path] | fields)
        assert (status, said) == (400, "stream_options.with_usage"), answer
        return
    status, said, answer = await asked(server, path, BODIES[path] | fields)
    assert (status, said) == (200, ignored), answer


async def test_a_stream_names_them_too(server: Server) -> None:
    body = BODIES[CHAT] | {"stream": True, "keep_alive": 5}
    async with aiohttp.ClientSession(server.url) as session, session.post(CHAT, json=body) as response:
        assert response.headers[HEADER] == "keep_alive"
        assert (await response.text()).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "fields", "param", "meant"),
    [
        (COMPLETIONS, {"max_token": 3}, "max_token", "max_tokens"),
        (CHAT, {"temprature": 1}, "temprature", "temperature"),
        (CHAT, {"stpo": "a"}, "stpo", "stop"),
        (CHAT, {"repeat_penlty": 1.1}, "repeat_penlty", "repeat_penalty"),
        (CHAT, {"options": {"temperatur": 1}}, "options.temperatur", "options.temperature"),
        (
            CHAT,
            {"stream": True, "stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "stream_options.include_usage",
        ),
        (RESPONSES, {"instruction": "Be brief"}, "instruction", "instructions"),
        (RESPONSES, {"text": {"verbosty": "low"}}, "text.verbosty", "text.verbosity"),
        ("/v1/embeddings", {"dimension": 3}, "dimension", "dimensions"),
    ],
)
async def test_a_misspelt_one_is_refused(server: Server, path: str, fields: Json, param: str, meant: str) -> None:
    status, _, answer = await asked(server, path, BODIES[path] | fields)
    assert status == 400
    assert answer["error"]["message"] == f"{param} is not known here; did you mean {meant}?"
    assert answer["error"]["param"] == param


async def test_a_misspelt_one_is_told_before_what_is_missing_for_it(server: Server) -> None:
    for path, body in ((CHAT, {"mesages": HI}), (COMPLETIONS, {"promt": "a"}), (MESSAGES, {"mesages": HI})):
        status, _, answer = await asked(server, path, body)
        assert status == 400
        assert "did you mean" in answer["error"]["message"]


def test_a_letter_less_or_two_swapped_is_misspelt() -> None:
    known = names_of(ChatRequest)
    for name in known:
        if len(name) > 4 and "." not in name:
            shorter, swapped = name[:-2] + name[-1], name[1] + name[0] + name[2:]
            for written in {shorter, swapped} - known:
                assert nearest(ChatRequest, written) is not None, written
    for name in ("image", "speed", "models", "state", "tags", "foo", "x", "id", "access_programs"):
        assert nearest(ChatRequest, name) is None, name


SDK: dict[str, Json] = {
    CHAT: {"moderation": None, "web_search_options": None, "verbosity": "low", "store": False, "speed": "fast"},
    RESPONSES: {
        "access_programs": [],
        "background_options": {},
        "image": {},
        "client_metadata": {},
        "max_tool_calls": 3,
    },
    MESSAGES: {
        "billing_policy": {},
        "compaction": {},
        "diagnostics": {},
        "fallback_credit_token": "a",
        "fallbacks": [],
        "inference_geo": "eu",
        "speed": "standard",
        "thread": {},
        "user_profile_id": "a",
        "workspace_id": "a",
    },
    "/v1/messages/count_tokens": {"speed": "standard", "user_profile_id": "a", "workspace_id": "a"},
}
"""Fields of the types of openai 3.57.0 and anthropic 2.14.0, and of Codex."""


@pytest.mark.parametrize("path", SDK)
async def test_the_fields_of_the_sdks_types(server: Server, path: str) -> None:
    status, _, answer = await asked(server, path, BODIES[path] | SDK[path])
    assert status == 200, answer


@pytest.mark.parametrize(
    ("path", "theirs", "ours"),
    [
        (CHAT, {"options": {"num_predict": 6, "temperature": 0}}, {"max_tokens": 6, "temperature": 0}),
        (CHAT, {"max_output_tokens": 6, "temperature": 0}, {"max_completion_tokens": 6, "temperature": 0}),
        (
            COMPLETIONS,
            {"repeat_penalty": 1.9, "n_predict": 9, "temperature": 0},
            {"repetition_penalty": 1.9, "max_tokens": 9, "temperature": 0},
        ),
        (
            COMPLETIONS,
            {"options": {"repeat_penalty": 1.9, "num_predict": 3}, "max_tokens": 9, "temperature": 0},
            {"repetition_penalty": 1.9, "max_tokens": 9, "temperature": 0},
        ),
        (COMPLETIONS, {"random_seed": 5, "max_new_tokens": 9}, {"seed": 5, "max_tokens": 9}),
        (
            COMPLETIONS,
            {"stop_sequences": ["e"], "max_tokens": 9, "seed": 1},
            {"stop": ["e"], "max_tokens": 9, "seed": 1},
        ),
        (COMPLETIONS, {"regex": "[ab]{5}", "seed": 1}, {"guided_regex": "[ab]{5}", "seed": 1}),
        (RESPONSES, {"max_tokens": 6, "temperature": 0}, {"max_output_tokens": 6, "temperature": 0}),
        (
            MESSAGES,
            {"stop": ["e"], "n_predict": 9, "seed": 1},
            {"stop_sequences": ["e"], "max_tokens": 9, "seed": 1},
        ),
    ],
)
async def test_what_means_one_of_ours_is_that(server: Server, path: str, theirs: Json, ours: Json) -> None:
    asks: Json = {key: value for key, value in BODIES[path].items() if "max" not in key}
    _, ignored, answer = await asked(server, path, asks | theirs)
    assert ignored is None
    _, _, expected = await asked(server, path, asks | ours)
    assert said(answer) == said(expected)


def said(answer: Json) -> Any:
    """What does not differ from one request to the next."""
    match answer:
        case {"choices": [choice]}:
            return choice, answer["usage"]["completion_tokens"]
        case {"output": [item]}:
            return item["content"][0]["text"], answer["status"]
    return answer["content"], answer["stop_reason"], answer["stop_sequence"]


@pytest.mark.parametrize(
    ("field", "neutral", "asks"),
    [
        ("mirostat", 0, 2),
        ("top_a", 0, 0.2),
        ("xtc_probability", 0.0, 0.5),
        ("typ_p", 1.0, 0.9),
        ("dry_multiplier", 0, 0.8),
    ],
)
async def test_what_would_change_the_answer_is_refused(
    server: Server, field: str, neutral: Any, asks: Any
) -> None:
    for path in (CHAT, RESPONSES, MESSAGES):
        assert (await asked(server, path, BODIES[path] | {field: neutral}))[:2] == (200, None)
        status, _, answer = await asked(server, path, BODIES[path] | {field: asks})
        assert status == 400
        assert "is not implemented" in answer["error"]["message"]


async def test_their_names_are_bounded_and_escaped(server: Server) -> None:
    odd = {"a\r\nSet-Cookie: x": 1, "ключ": 2, "x" * 10_000: 3}
    _, ignored, _ = await asked(server, COMPLETIONS, BODIES[COMPLETIONS] | odd)
    assert ignored == f"a%0D%0ASet-Cookie%3A%20x, %D0%BA%D0%BB%D1%8E%D1%87, {'x' * 64}"
    many = {f"unknown-{number:0>40}": number for number in range(200)}
    status, ignored, _ = await asked(server, COMPLETIONS, BODIES[COMPLETIONS] | many)
    assert status == 200
    assert ignored is not None
    assert len(ignored) <= MAX_IGNORED + len("...")
    assert ignored.endswith(", ...")


async def test_each_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(token(" end", finish_reason=FinishReason.STOP))
    engine.tokenizer = Tokenizer()
    async with serving(engine) as client:
        for _ in range(3):
            await client.post(COMPLETIONS, json={"prompt": "a", "colour": 1, "size": {"colour": 2}})
    assert [record.args for record in caplog.records if "not known here" in record.message] == [
        ("colour",),
        ("size",),
    ]


def test_so_many_are_logged() -> None:
    said = Once()
    assert sum(said.is_new(f"f{number % 2000}") for number in range(3000)) == 1000


async def test_they_are_refused_where_that_is_asked_for(dressed_server: Server) -> None:
    for fields, param in (
        ({"colour": 1}, "colour"),
        ({"logit_bias": {}, "response_format": {"type": "text", "colour": 1}}, "response_format.colour"),
    ):
        status, _, answer = await asked(dressed_server, CHAT, BODIES[CHAT] | fields)
        assert (status, answer["error"]["message"]) == (400, f"{param} is not known here")
        assert answer["error"]["param"] == param
    body = BODIES[CHAT] | {"messages": [{"role": "user", "content": "Hi", "timestamp": 5}], "repeat_penalty": 1.1}
    status, ignored, _ = await asked(dressed_server, CHAT, body)  # programs put keys of their own into messages
    assert (status, ignored) == (200, "messages[].timestamp")
