"""Keeps an engine running: starts its process, sees when it dies or hangs, and starts another one."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from scheduler.client.handle import EngineProcess
from scheduler.wire.messages import EngineFailed, EngineInfo, FromEngine, Launch, ToEngine

CHECK_SECONDS = 0.25
"""Between two looks at the pulse."""

STOPPED_SECONDS = 4.0
"""Without a beat, after which an engine is lost that the system does not let run."""

SILENCE_SECONDS = 30.0
"""The same for one that may run: a library may keep the interpreter to itself for seconds, as when the engine
learns a tokenizer of 150,000 tokens."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a new start, from the second in a row on, doubled each time."""

MOST_FAILURES = 6
"""Engines in a row that gave nobody a token or an embedding: then no more are started."""

logger = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The engine could not start; the message is for the user."""


class EngineDeadError(RuntimeError):
    """The engine is gone for good, or was stopped; the message says why."""


class Phase(enum.Enum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    """There will be no other."""
    STOPPED = "stopped"


class Ward(Protocol):
    """Whom the supervisor tells."""

    async def engine_ready(self, info: EngineInfo) -> None:
        """An engine is there, and knows of nothing yet."""

    async def engine_says(self, message: FromEngine) -> None:
        """A message of it."""

    def engine_lost(self, reason: str, in_hand: Sequence[str]) -> None:
        """It is gone, with these requests in its hands; another one is on its way."""

    def engine_failed(self, reason: str) -> None:
        """There will be no other."""


class Supervisor:
    """At most one engine at a time."""

    def __init__(self, ward: Ward) -> None:
        self._ward = ward
        self._process: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None]
        self._num_failures = 0
        self._trouble = ""
        self._lost_at: float | None = None
        self._pool_bytes = 0
        self.phase = Phase.STARTING

    @property
    def obstacle(self) -> str | None:
        """Why there is no engine now; None: there is one."""
        match self.phase:
            case Phase.READY:
                return None
            case Phase.STARTING:
                return f"{self._trouble}; a new one is starting" if self._trouble else "the engine is starting"
        return self._trouble

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one."""
        return None if self._process is None else self._process.pid

    def has_progressed(self) -> None:
        """Somebody got a token, or an embedding."""
        self._num_failures = 0

    async def send(self, message: ToEngine) -> None:
        """To the engine, if there is one. The next one knows nothing of it."""
        if self._process is not None and self.phase is Phase.READY:
            await self._process.send(message)

    async def start(self, find: Callable[[], Awaitable[Launch]]) -> None:
        """Start the first engine, and return when it is ready. `find` says what is to be launched. Raises
        `EngineStartError`, and what `find` raises."""
        self._ready = asyncio.get_running_loop().create_future()
        process = self._process = await EngineProcess.start()
        try:
            launch = await find()  # while the process imports what it needs, which takes longer
        except BaseException:
            await self._end(process)
            raise
        process.launch(launch)
        self._task = asyncio.create_task(self._supervise(process, launch))
        await self._ready

    async def stop(self) -> None:
        """End the engine, and start no more."""
        was_ready = self.phase is Phase.READY
        self.phase, self._trouble = Phase.STOPPED, "the engine was stopped"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if (process := self._process) is not None:
            if was_ready:
                await process.shut_down()
            await self._end(process)

    async def _supervise(self, process: EngineProcess, launch: Launch) -> None:
        """One engine after the other, until there is no hope left."""
        try:
            while await self._live(process):
                process = self._process = await EngineProcess.start()
                launch = self._as_large(launch)
                process.launch(launch)
        except Exception as error:
            logger.exception("supervising the engine failed")
            self._fail(f"supervising the engine failed ({type(error).__name__}); the log says why")

    def _as_large(self, launch: Launch) -> Launch:
        """The next engine's pool is as large as the first one's, whatever memory is free now: what was accepted
        must fit."""
        return msgspec.structs.replace(launch, config=launch.config | {"kv_cache_memory": self._pool_bytes})

    async def _live(self, process: EngineProcess) -> bool:
        """One engine's life. Returns when it is time for the next, or False if there will be none."""
        reason = await self._end_of(process)
        self._lost_at = time.monotonic()
        await process.kill()
        async for message in process.last_messages():
            await self._tell(message)
        in_hand = process.pulse.in_hand
        await self._end(process)
        if not self._ready.done():  # the first one has only one try
            self._fail(reason)
            return False
        self._num_failures += 1
        self.phase, self._trouble = Phase.STARTING, reason
        logger.error("%s; %d requests were in its hands", reason, len(in_hand))
        self._ward.engine_lost(reason, in_hand)
        if self._num_failures >= MOST_FAILURES:
            count = self._num_failures
            self._fail(f"{count} engines in a row gave nobody a token or an embedding, the last one: {reason}")
            return False
        if self._num_failures > 1:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (self._num_failures - 2))
            logger.warning("the next engine starts in %.1f s", pause)
            await asyncio.sleep(pause)
        return True

    def _fail(self, reason: str) -> None:
        self.phase, self._trouble = Phase.FAILED, reason
        if not self._ready.done():
            self._ready.set_exception(EngineStartError(reason))
        else:
            logger.critical("%s; no other is started", reason)
            self._ward.engine_failed(reason)

    async def _end_of(self, process: EngineProcess) -> str:
        """Returns how an engine ended, once it has, or hangs, or refuses to begin."""
        tasks = [asyncio.create_task(each(process)) for each in (self._receive, self._wait, self._watch)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(task for task in tasks if task in done).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, process: EngineProcess) -> str:
        """Hand its messages on; returns when it refuses to begin, or says what makes no sense."""
        messages = process.messages()
        while True:
            try:
                message = await anext(messages)
            except msgspec.MsgspecError as error:
                return f"the engine's process sent a message that is none ({error})"
            match message:
                case EngineInfo(pool_bytes=pool_bytes):
                    self._pool_bytes = pool_bytes
                    self.phase = Phase.READY
                    if self._lost_at is not None:
                        logger.warning("the engine is back after %.1f s", time.monotonic() - self._lost_at)
                    await self._ward.engine_ready(message)
                    if not self._ready.done():
                        self._ready.set_result(None)
                case EngineFailed(reason):
                    return reason
                case _:
                    await self._tell(message)

    async def _tell(self, message: FromEngine) -> None:
        try:
            await self._ward.engine_says(message)
        except Exception:
            logger.exception("what the engine said could not be taken in")

    async def _wait(self, process: EngineProcess) -> str:
        return f"the engine's process {await process.wait()}; its log says more"

    async def _watch(self, process: EngineProcess) -> str:
        """Returns when it hangs, or cannot be reached."""
        since = looked = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            if now - looked > 4 * CHECK_SECONDS:
                since = now  # it was this process that stood still, and the other may have stood still with it
            looked = now
            if (folder := process.lost_folder) is not None:
                return f"{folder}, the folder of its sockets, vanished while it was starting"
            silence = now - max(process.pulse.last_beat, since)
            if silence > STOPPED_SECONDS and (process.is_stopped or silence > SILENCE_SECONDS):
                return f"the engine's process gave no sign of life for {silence:.1f} s"
            work = process.pulse.work
            if work is not None and now - max(work.started, since) > work.limit:
                return f"step {work.number} of the engine has taken {now - work.started:.1f} s: it hangs"

    async def _end(self, process: EngineProcess) -> None:
        await process.kill()
        process.close()
        if process is self._process:
            self._process = None
