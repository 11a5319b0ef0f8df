"""One process of the engine, as its parent holds it: its sockets, its pulse, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import msgspec
import psutil
import zmq
import zmq.asyncio

from scheduler.wire.messages import OUTPUTS, REQUESTS, FromEngine, Launch, Shutdown, StepOutputs, ToEngine
from scheduler.wire.pulse import Pulse, new_pulse_file

LONGEST_FOLDER = 70
"""Characters of the temporary folder, so that a socket's name in a folder there has no more than 107."""

SHUTDOWN_SECONDS = 5.0

_folders: dict[str, int | None] = {}
"""Of this process's engines, and whose they are, once that is known."""


def abandon_engines() -> None:
    """For a process that ends this moment, wherever its engines are in their lives: none stays, nor a file of
    theirs. May be called in a signal handler."""
    for folder, pid in list(_folders.items()):
        if pid is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


class EngineProcess:
    """Started before it is known what to load: importing what it needs takes longer than finding that out."""

    def __init__(
        self, process: asyncio.subprocess.Process, pulse: Pulse, folder: tempfile.TemporaryDirectory[str]
    ) -> None:
        self.pulse = pulse
        self._process = process
        self.folder = folder
        """Of its sockets."""
        self._is_heard = False
        self._context = zmq.asyncio.Context()
        self._requests = self._context.socket(zmq.PUSH)
        # Sending never waits: the end that connects queues what it sends even while nobody is there to take it, as
        # when the process has just died, and the end that binds would wait for the next to come.
        self._requests.set(zmq.SNDHWM, 0)
        self._requests.connect(f"ipc://{self.folder.name}/{REQUESTS}")
        self._outputs = self._context.socket(zmq.PULL)
        self._outputs.bind(f"ipc://{self.folder.name}/{OUTPUTS}")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @classmethod
    async def start(cls) -> Self:
        """Start a process; it does nothing yet that matters."""
        where = tempfile.gettempdir()
        if len(where) > LONGEST_FOLDER:  # the system knows no longer names of sockets
            where = "/tmp"
        folder = tempfile.TemporaryDirectory(prefix="carousel-", dir=where, ignore_cleanup_errors=True)
        _folders[folder.name] = None
        descriptor = new_pulse_file()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "scheduler.process.child",
            str(descriptor),
            str(os.getpid()),
            folder.name,
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        _folders[folder.name] = process.pid
        return cls(process, Pulse(descriptor), folder)

    @property
    def pid(self) -> int:
        return self._process.pid

    def launch(self, launch: Launch) -> None:
        """Tell it what to load."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has died: `wait` tells
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")

    async def send(self, message: ToEngine) -> None:
        await self._requests.send(self._encoder.encode(message))

    async def messages(self) -> AsyncIterator[FromEngine]:
        """What it says, without an end."""
        while True:
            message = self._decoder.decode(await self._outputs.recv())
            self._is_heard = True
            if isinstance(message, StepOutputs):  # it has heard and it is heard: no file is needed any more
                self.folder.cleanup()
            yield message

    async def last_messages(self) -> AsyncIterator[FromEngine]:
        """What it had said before it died."""
        with contextlib.suppress(zmq.Again):
            while True:
                yield self._decoder.decode(await self._outputs.recv(zmq.NOBLOCK))

    @property
    def lost_folder(self) -> str | None:
        """Where its sockets were, if they are gone before it could be heard: some programs tidy up temporary
        folders."""
        is_there = self._is_heard or Path(self.folder.name).is_dir()
        return None if is_there else self.folder.name

    @property
    def is_stopped(self) -> bool:
        """Whether the system does not let it run (SIGSTOP, a debugger)."""
        try:
            status: str = psutil.Process(self._process.pid).status()
        except psutil.Error:  # it has just ended: `wait` tells
            return False
        return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

    async def wait(self) -> str:
        """How it ended, in words."""
        code = await self._process.wait()
        return f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"

    async def kill(self) -> None:
        """End it now."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def shut_down(self) -> None:
        """Let it end by itself, for a while."""
        if self._process.returncode is None:
            await self.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), SHUTDOWN_SECONDS)
        await self.kill()

    def close(self) -> None:
        """After its end: nothing of it is left."""
        self._context.destroy(linger=0)
        self.folder.cleanup()
        _folders.pop(self.folder.name, None)
        self.pulse.close()
