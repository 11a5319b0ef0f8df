"""The broadcaster of the live page, with an engine that fails."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, cast

import msgspec
import pytest

from scheduler.client.async_engine import AsyncEngine
from scheduler.wire.messages import EngineState
from server.live.broadcaster import Live


class FailingEngine:
    """Stands in for an idle AsyncEngine that cannot be watched the first time."""

    def __init__(self) -> None:
        self.listeners: list[Any] = []
        self.latency_listeners: list[Any] = []
        self.seats: list[Any] = []
        self.waiting: dict[str, int] = {}
        self.state = EngineState(0, 0, 0, 0, 0.0)
        self.block_map = b""
        self.error = None
        self.num_watches = 0

    async def watch(self, interval: float | None) -> None:
        self.num_watches += 1
        if self.num_watches == 1:
            raise RecursionError("out of order")


async def test_a_page_gets_frames_again_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("scheduler.client.background.FIRST_PAUSE", 0.0)
    monkeypatch.setattr("server.live.broadcaster.FRAME_SECONDS", 0.01)
    live = Live(cast(AsyncEngine, FailingEngine()), with_users=False)
    running = asyncio.create_task(live.run())
    async with asyncio.timeout(30), aclosing(live.frames()) as frames:
        assert msgspec.json.decode(await anext(frames))["event"] == "frame"
    assert "the live page failed" in caplog.text
    assert "out of order" in caplog.text
    running.cancel()
