"""No task beside the requests ends without a word."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.client import background


async def test_what_fails_is_logged_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.0)
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise RecursionError(f"number {runs}")

    await background.keep_running("looking after things", run)
    assert runs == 3
    assert caplog.text.count("looking after things failed") == 2
    assert caplog.text.count("Traceback") == 2


async def test_it_can_be_cancelled_as_any_other() -> None:
    task = asyncio.create_task(background.keep_running("waiting", asyncio.Event().wait))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
