"""The application with an engine that follows a script, in this process: for what the real one does not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Self, cast

from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from scheduler.client.async_engine import AsyncEngine, Delta, Phase
from scheduler.client.grammars import Grammars
from scheduler.core.step import ChunkResult, SampledToken
from scheduler.observing.metrics import EngineMetrics
from scheduler.wire.messages import EngineInfo, SequenceOutput
from server.app import create_app
from server.config import ServeConfig

LONGEST = 1024
"""Tokens that prompt plus answer can have."""


def token(text: str, **more: Any) -> Delta:
    """One token's; `more` of what the engine says."""
    output = SequenceOutput(
        **{"request_id": "scripted", "index": 0, "result": ChunkResult([SampledToken(7)]), **more}
    )
    return Delta(output, text)


class ScriptedEngine:
    """Stands in for AsyncEngine: every request gets the same deltas, or the exception among them; an event is
    waited for."""

    info = EngineInfo("scripted", LONGEST, 100, 64, 16, "float32", "cpu", "torch", "float32", 0, "")
    error: str | None = None
    phase = Phase.READY

    def __init__(self, *script: Delta | Exception | asyncio.Event) -> None:
        self._script = script
        self.num_running = 0
        self.registry = CollectorRegistry()
        self.metrics = EngineMetrics(self.registry, "scripted")
        self.listeners: list[object] = []
        self.tokenizer: Any = SimpleNamespace(longest_token=16)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if "grammars" in self.__dict__:
            self.grammars.close()

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer.definition, self.info.eos_token_ids)

    async def generate(self, *request: object, **options: object) -> AsyncGenerator[Delta, None]:
        self.num_running += 1
        try:
            for item in self._script:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    yield item
        finally:
            self.num_running -= 1


@asynccontextmanager
async def serving(engine: ScriptedEngine, **knobs: Any) -> AsyncGenerator[TestClient[Any, Any], None]:
    app = create_app(ServeConfig(**knobs), cast(AsyncEngine, engine), engine.registry)
    async with TestClient(TestServer(app)) as client:
        yield client
    assert engine.num_running == 0
