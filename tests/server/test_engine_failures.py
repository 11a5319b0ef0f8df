"""What a client sees when the engine fails. The real one does not, so these tests script one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from scheduler.client.async_engine import Delta, EngineDeadError, Phase, RequestCrashedError
from scheduler.core.request import FinishReason
from scheduler.core.step import NOTHING
from server.api import generation
from server.http import sse
from tests.server.scripted import ScriptedEngine, serving, token

BODY = {"prompt": [1, 2, 3], "max_tokens": 8}
FAILURE = token("", result=NOTHING, finish_reason=FinishReason.ERROR, error="the model's output is not a number")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (FAILURE, 500, "the model's output is not a number"),
        (EngineDeadError("the engine is gone"), 503, "the engine is gone"),
        (RequestCrashedError("it crashes the engine"), 500, "it crashes the engine"),
        (
            ZeroDivisionError("a secret"),
            500,
            "internal error; the server's log has it under request id r1",
        ),
    ],
)
async def test_before_the_first_token_it_is_a_status(
    stream: bool, failure: Delta | Exception, status: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ScriptedEngine(failure)) as client:
        response = await client.post(
            "/v1/completions", json={**BODY, "stream": stream}, headers={"X-Request-Id": "r1"}
        )
        assert response.status == status
        error = (await response.json())["error"]
    assert (error["message"], error["type"]) == (message, "server_error")
    assert ("a secret" in caplog.text) == isinstance(failure, ZeroDivisionError), "only the log knows it"


async def test_after_the_first_token_it_is_the_last_event() -> None:
    async with serving(ScriptedEngine(token("Once"), token(" upon"), FAILURE)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        assert response.status == 200
        first, second, error, rest = (await response.text()).split("\n\n")
    assert '"text":"Once"' in first
    assert '"text":" upon"' in second
    assert error.startswith('data: {"error":{"message":"the model\'s output is not a number"')
    assert rest == "", "no [DONE] after a failure"


async def test_without_a_stream_a_late_failure_is_a_status_too() -> None:
    async with serving(ScriptedEngine(token("Once"), FAILURE)) as client:
        response = await client.post("/v1/completions", json=BODY)
        assert response.status == 500


async def test_one_failing_prompt_ends_the_others() -> None:
    async with serving(ScriptedEngine(token("Once"), FAILURE)) as client:
        response = await client.post("/v1/completions", json={**BODY, "prompt": [[1], [2], [3]]})
        assert response.status == 500


async def test_health_tells_live_from_ready() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as client:
        for path in ("/health", "/health/live", "/health/ready", "/ping"):
            assert (await client.get(path)).status == 200
        for phase, retry in ((Phase.STARTING, "5"), (Phase.FAILED, None)):
            engine.error, engine.phase = "the engine is gone", phase
            response = await client.get("/health/ready")
            assert (response.status, response.headers.get("Retry-After")) == (503, retry)
            assert (await response.json())["error"]["message"] == "the engine is gone"
            assert (await client.get("/health/live")).status == 200


async def test_text_that_is_held_back_makes_no_event() -> None:
    last = token(" upon", finish_reason=FinishReason.STOP)
    async with serving(ScriptedEngine(token("Once"), token(""), token(""), last)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        events = (await response.text()).split("\n\n")
    assert len(events) == 4, "two pieces of text, [DONE], and nothing behind it"


async def test_a_stream_that_waits_for_its_first_token_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(sse, "PULSE_SECONDS", 0.02)
    seated = asyncio.Event()
    async with serving(ScriptedEngine(seated, token("Once"), FAILURE)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        assert response.status == 200, "the headers are there before the token"
        for _ in range(2):
            assert await response.content.readuntil(b"\n\n") == b": waiting\n\n"
        seated.set()
        events = (await response.text()).split("\n\n")
    assert '"text":"Once"' in events[-3]
    assert events[-2].startswith('data: {"error":{"message":"the model\'s output is not a number"')


async def test_a_stream_says_how_far_its_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(sse, "PULSE_SECONDS", 0.02)

    class Slow(ScriptedEngine):
        async def generate(self, *request: object, **options: Any) -> AsyncGenerator[Delta, None]:
            options["computed"](2)
            async for delta in super().generate(*request, **options):
                yield delta

    seated = asyncio.Event()
    async with serving(Slow(seated, token("Once"), FAILURE)) as client:
        response = await client.post("/v1/completions", json={"prompt": [5, 6, 7], "stream": True})
        assert await response.content.readuntil(b"\n\n") == b": 2 of 3 tokens of the prompt are computed\n\n"
        seated.set()
        assert '"text":"Once"' in await response.text()


async def test_an_error_after_the_headers_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.01)
    seated = asyncio.Event()
    async with serving(ScriptedEngine(seated, FAILURE)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        seated.set()
        assert response.status == 200
        assert (await response.text()).startswith('data: {"error":{"message":"the model\'s output')


async def test_who_leaves_before_the_first_token_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.01)
    engine = ScriptedEngine(asyncio.Event(), token("Never"))
    async with serving(engine) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        assert engine.num_running == 1
        response.close()
        async with asyncio.timeout(10):
            while engine.num_running:
                await asyncio.sleep(0.01)
