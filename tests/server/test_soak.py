"""A piece of the soak (`python -m benchmarks.soak`): too short to say anything of memory."""

from __future__ import annotations

import pytest

from benchmarks.soak.__main__ import run, soaked_server

MINUTES = 0.6


@pytest.mark.prove
async def test_nothing_is_left_and_nobody_is_forgotten() -> None:
    with soaked_server() as (soaked, is_mounted):
        wrong = await run(soaked, MINUTES, is_mounted)
        assert [name for name in wrong if name != "memory grows"] == []
        assert soaked.outcomes["engine killed"] > 0
        assert soaked.outcomes["answered"] > 20
