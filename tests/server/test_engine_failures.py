"""What a client sees when the engine fails. The real one does not, so these tests script one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from scheduler.engine.client import AsyncEngine, Delta, EngineDeadError
from scheduler.messages import EngineInfo
from scheduler.request import FinishReason
from server.app import create_app
from server.config import ServeConfig

BODY = {"prompt": [1, 2, 3], "max_tokens": 8}


def token(text: str, *, index: int = 0) -> Delta:
    return Delta(index, text, [7], None, None, None, 0, None)


FAILURE = Delta(0, "", [], None, FinishReason.ERROR, None, 0, "the model's output is not a number")


class ScriptedEngine:
    """Stands in for AsyncEngine: every request gets the same deltas, or the exception among them."""

    tokenizer = SimpleNamespace(longest_token=16)
    info = EngineInfo("scripted", 1024, 100, 64, 16, "float32", "cpu", "torch", "float32", 0, "")
    error: str | None = None

    def __init__(self, *script: Delta | Exception) -> None:
        self._script = script
        self.num_running = 0
        self.listeners: list[object] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None: ...

    async def generate(self, *request: object, **options: object) -> AsyncGenerator[Delta, None]:
        self.num_running += 1
        try:
            for item in self._script:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.num_running -= 1


@asynccontextmanager
async def serving(engine: ScriptedEngine) -> AsyncGenerator[TestClient[Any, Any], None]:
    app = create_app(ServeConfig(), cast(AsyncEngine, engine), CollectorRegistry())
    async with TestClient(TestServer(app)) as client:
        yield client
    assert engine.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (FAILURE, 500, "the model's output is not a number"),
        (EngineDeadError("the engine is gone"), 503, "the engine is gone"),
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


async def test_health_tells_why() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as client:
        assert (await client.get("/health")).status == 200
        engine.error = "the engine is gone"
        response = await client.get("/health")
        assert response.status == 503
        assert (await response.json())["error"]["message"] == "the engine is gone"


async def test_text_that_is_held_back_makes_no_event() -> None:
    last = Delta(0, " upon", [7], None, FinishReason.STOP, None, 0, None)
    async with serving(ScriptedEngine(token("Once"), token(""), token(""), last)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        events = (await response.text()).split("\n\n")
    assert len(events) == 4, "two pieces of text, [DONE], and nothing behind it"
