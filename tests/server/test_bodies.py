"""What a request may weigh: bounds that are looked at first, and work that holds no stream up."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import ExitStack
from threading import current_thread, main_thread
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.core.request import FinishReason, InvalidRequestError
from scheduler.core.step import ChunkResult, SampledToken, TokenLogprobs
from scheduler.sampling_params import SamplingParams
from server.api import generation
from server.api.chat import ChatWording
from server.api.chat_request import ChatRequest, Message
from server.api.completion_objects import PromptTokensDetails, Usage
from server.api.completion_request import CompletionRequest
from server.api.completions import CompletionWording, Prompt
from server.api.conversation import Conversation
from server.api.shape import MAX_FIELD_BYTES, check_chat, check_completion
from server.http.body import BodyRoom
from server.http.errors import ApiError
from server.http.json import encode
from server.http.worker import LONG
from server.parsing.events import PlainParser
from tests.server.scripted import LONGEST, ScriptedEngine, serving, token

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MANY = {f"x{place}": 1 for place in range(50_000)}
LAST = token(" end", finish_reason=FinishReason.STOP)


class Tokenizer:
    """A token is a character. It notes the threads in which it was asked, and what it decoded."""

    longest_token = 16

    def __init__(self) -> None:
        self.threads: set[bool] = set()
        self.calls: Counter[str] = Counter()

    def _called(self, what: str) -> None:
        self.calls[what] += 1
        self.threads.add(current_thread() is main_thread())

    def encode(self, text: str, special: bool, *, longest: int, cut: bool = False) -> list[int]:
        self._called("encode")
        return [7] * len(text)

    def decode(self, tokens: list[int], **options: bool) -> str:
        self._called("decode")
        return "x" * len(tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        self._called("template")
        return [7] * len(messages)

    def token_text(self, token_id: int) -> str:
        self._called("token_text")
        return f"t{token_id}"

    chat_template = SimpleNamespace(source="")
    has_response_template = False

    def control_tokens(self) -> dict[str, int]:
        return {}

    def token_bytes(self, token_id: int) -> bytes:
        return f"t{token_id}".encode()


# Bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETIONS, {"prompt": "a", **MANY}, None, "64 KiB of fields that are not known here"),
        (COMPLETIONS, {"prompt": [7] * LONGEST}, "prompt", f"has {LONGEST} tokens"),
        (COMPLETIONS, {"prompt": [7] * 100_000, "echo": True, "n": 128}, "prompt", "has 100000 tokens"),
        (COMPLETIONS, {"prompt": [[7]] * 2049}, "prompt", "2049 items, and can have 2048 at most"),
        (COMPLETIONS, {"prompt": ["a"] * 2049}, "prompt", "2049 items, and can have 2048 at most"),
        (COMPLETIONS, {"prompt": [[7] * 1000] * 101}, "prompt", "101000 tokens, and 100000 may wait"),
        (COMPLETIONS, {"prompt": [[7, [7]]]}, "prompt", "prompt should be a string, a list of strings"),
        (COMPLETIONS, {"prompt": ["a", MANY]}, "prompt", "prompt should be a string, a list of strings"),
        (COMPLETIONS, {"prompt": MANY}, "prompt", "prompt is longer than 64 KiB"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [7] * 100_000}, "stop_token_ids", "longer than 64 KiB"),
        (COMPLETIONS, {"prompt": "a", "metadata": MANY}, "metadata", "metadata is longer than 64 KiB"),
        (COMPLETIONS, {"prompt": "a", "stop": "b" * 257}, "stop", "at most 256 characters"),
        (CHAT, {"messages": [{"role": "user", "content": ""}] * (LONGEST + 1)}, "messages", "1025 items"),
        (CHAT, {"messages": [{"role": "user", "content": "", **MANY}]}, "messages[0]", "besides its text"),
        (CHAT, {"messages": [{"role": "user", "content": MANY}]}, "messages[0].content", "longer than 64 KiB"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", **MANY}]}]},
            "messages[0].content",
            "a string or a list of text parts",
        ),
        (CHAT, {"messages": [{"role": "user", "content": [list(MANY)]}]}, "messages[0].content", "of text parts"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "", "tool_calls": MANY}]},
            "messages[0].tool_calls",
            "64",
        ),
        (COMPLETIONS, list(MANY), None, "must be a JSON object"),
    ],
)
async def test_what_is_too_much_is_refused_before_it_is_read(
    path: str, body: Any, param: str | None, message: str
) -> None:
    engine = ScriptedEngine(LAST)
    engine.tokenizer = Tokenizer()
    async with serving(engine, max_queued_tokens=100_000) as client:
        response = await client.post(path, json=body)
        assert response.status == 400
        error = (await response.json())["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert not engine.tokenizer.calls


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"prompt":' + b"[" * 100_000, b'{"\xff":1}', b'{"prompt": nul}']
)
def test_what_is_no_json_is_told_so(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"not valid JSON|must be a JSON object"):
        check_completion(body, longest=9, max_tokens=9)


def test_a_long_text_is_no_long_field() -> None:
    text = ", [{" * MAX_FIELD_BYTES
    check_completion(json.dumps({"prompt": text}).encode(), longest=9, max_tokens=9)
    check_completion(json.dumps({"prompt": [text, text]}).encode(), longest=9, max_tokens=9)
    for content in (text, [{"type": "text", "text": text}]):
        body = {"messages": [{"role": "user", "content": content}]}
        check_chat(json.dumps(body).encode(), longest=9)


def test_there_is_room_for_so_much_of_all_bodies_and_a_part_of_it_for_each_user() -> None:
    room = BodyRoom()
    with ExitStack() as held:
        alices = [held.enter_context(room.place("alice")) for _ in range(200)]
        for place in alices[:10]:
            place.take(100, 1000)
        for place in alices:  # what she sends more is refused, wherever it belongs
            with pytest.raises(ApiError) as refused:
                place.take(1, 1000)
            assert (refused.value.status, refused.value.rejection) == (429, "bodies")
        bobs = held.enter_context(room.place("bob"))
        bobs.take(500, 1000)  # half is his
        with pytest.raises(ApiError):
            bobs.take(1, 1000)
        held.enter_context(room.place("carol")).take(333, 1000)
    with room.place("alice") as place:
        place.take(1000, 1000)  # nothing is left of them


# Work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "work"),
    [
        (COMPLETIONS, {"prompt": "x" * LONG}, {"encode": 1}),
        (COMPLETIONS, {"prompt": ["x" * 900] * 12}, {"encode": 12}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * LONG}]}, {"template": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 1000}, {"template": 1}),
        (COMPLETIONS, {"prompt": [[1000] * 1000] * 2, "echo": True, "n": 128}, {"decode": 2}),
    ],
)
async def test_a_long_body_is_read_off_the_loop(path: str, body: dict[str, Any], work: dict[str, int]) -> None:
    ends = [token(" end", index=index, finish_reason=FinishReason.STOP) for index in range(body.get("n", 1))]
    engine = ScriptedEngine(*ends)
    engine.tokenizer = Tokenizer()
    async with serving(engine) as client:
        assert (await client.post(path, json=body)).status == 200
    assert engine.tokenizer.calls == work
    assert engine.tokenizer.threads == {False}, "never in the thread of the streams"


async def test_the_specification_is_made_before_anybody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(ScriptedEngine(LAST)) as client:
        monkeypatch.setattr("server.openapi.specification", lambda *_, **__: 1 // 0)
        for _ in range(2):
            response = await client.get("/openapi.json")
            assert response.status == 200
            assert COMPLETIONS in (await response.json())["paths"]


async def test_many_prompts_are_submitted_a_few_at_a_time() -> None:
    turns = 0
    starts: Counter[int] = Counter()

    class Counting(ScriptedEngine):
        async def generate(self, *request: object, **options: object) -> Any:
            starts[turns] += 1
            async for delta in super().generate(*request, **options):
                yield delta

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with serving(Counting(LAST)) as client:
        turning = asyncio.create_task(turn())
        response = await client.post(COMPLETIONS, json={"prompt": [[7]] * 1000})
        turning.cancel()
        assert len((await response.json())["choices"]) == 1000
    assert starts.total() == 1000
    assert max(starts.values()) <= 2 * generation.AT_ONCE


ASKED = ChatRequest(messages=[Message(role="user")], logprobs=True)
CONVERSATION = Conversation(ASKED, "m", [7], SamplingParams(), None, PlainParser, frozenset(), [])


@pytest.mark.parametrize("shape", ["completion", "chat"])
def test_logprobs_are_worded_as_they_come(shape: str) -> None:
    tokenizer: Any = Tokenizer()
    words: CompletionWording | ChatWording = (
        CompletionWording(tokenizer, CompletionRequest(prompt=["a"], logprobs=2), "m", [Prompt([7], "")], 1)
        if shape == "completion"
        else ChatWording(tokenizer, ASKED, CONVERSATION)
    )
    for place in range(3):
        entry = TokenLogprobs(place, -0.5, [(place, -0.5), (9, -2.0)])
        words.take(0, token(f"t{place}", result=ChunkResult([SampledToken(place, entry)])))
    tokenizer.calls.clear()
    answer = json.loads(encode(words.whole(Usage(1, 3, 4, PromptTokensDetails(0)))))
    assert not tokenizer.calls, "nothing is left for the end"
    logprobs = answer["choices"][0]["logprobs"]
    if shape == "completion":
        assert answer["choices"][0]["text"] == "t0t1t2"
        assert logprobs["tokens"] == ["t0", "t1", "t2"]
        assert logprobs["top_logprobs"] == [{f"t{place}": -0.5, "t9": -2.0} for place in range(3)]
        assert logprobs["text_offset"] == [0, 2, 4]
    else:
        assert answer["choices"][0]["message"]["content"] == "t0t1t2"
        assert [entry["token"] for entry in logprobs["content"]] == ["t0", "t1", "t2"]
        assert [top["token"] for top in logprobs["content"][2]["top_logprobs"]] == ["t2", "t9"]
