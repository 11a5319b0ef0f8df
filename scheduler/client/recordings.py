"""Traces that are asked for while the engine runs: of so many steps each."""

from __future__ import annotations

import asyncio

from scheduler.client.supervisor import EngineDeadError, Supervisor
from scheduler.wire.messages import Recorded, RecordTrace


class Recordings:
    """Those that are under way."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._waiting)

    async def record(self, num_steps: int) -> bytes:
        """The next steps as a JSON array of Chrome trace events; returns when they are done. Raises
        `EngineDeadError`."""
        self._last_number += 1
        number = self._last_number
        recorded: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = recorded
        try:
            await self._supervisor.send(RecordTrace(number, num_steps))
            return await recorded
        finally:
            del self._waiting[number]
            if recorded.cancelled() or not recorded.done():  # whoever asked has gone
                await self._supervisor.send(RecordTrace(number, 0))

    def take(self, message: Recorded) -> None:
        """One is done."""
        recorded = self._waiting.get(message.number)
        if recorded is not None and not recorded.done():  # else whoever asked has gone
            recorded.set_result(message.events)

    def give_up(self, reason: str) -> None:
        """The engine that recorded is gone."""
        for recorded in self._waiting.values():
            if not recorded.done():
                recorded.set_exception(EngineDeadError(reason))
