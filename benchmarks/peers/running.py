"""Starts, pauses and stops the servers, in one way for all measurements."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.peers.catalogue import PEERS, Load, Peer, Service
from benchmarks.peers.installing import PEERS_FOLDER, PeerError
from benchmarks.processor import HELD_TO_AVX2
from server.bench.load import LoadClient

START_SECONDS = 600
REQUEST_SECONDS = 900
"""At most for one request: four prompts of 6,000 tokens at once take their time."""


class Server:
    """A peer that runs, and can be paused between its turns."""

    def __init__(
        self, peer: Peer, client: LoadClient, process: subprocess.Popen[bytes], bits: float | None
    ) -> None:
        self.peer = peer
        self.client = client
        self.bits = bits
        """Bits that one weight takes, if it is known."""
        self._process = process

    def pause(self) -> None:
        """Stop it where it is, so that it costs nothing."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    @contextmanager
    def turn(self) -> Iterator[LoadClient]:
        """It runs in here, and is paused afterwards."""
        self.resume()
        try:
            yield self.client
        finally:
            self.pause()


def prepare(names: Sequence[str], load: Load) -> list[tuple[Peer, Service]]:
    """Install and convert whatever is missing, before anything is measured. What cannot be is left out, with a
    line that says why."""
    ready = []
    for name in (bar := tqdm(names, desc="preparing", unit="server")):
        bar.set_postfix_str(name)
        try:
            ready.append((PEERS[name], PEERS[name].prepare(load)))
        except PeerError as error:
            tqdm.write(f"{name} is left out: {error}", file=sys.stderr)
    return ready


@contextmanager
def running(peer: Peer, service: Service, load: Load) -> Iterator[Server]:
    """Start a peer, wait until it answers, and stop it at the end. Raises `PeerError`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = PEERS_FOLDER / "logs" / f"{peer.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    held = HELD_TO_AVX2 if load.processor.is_held else {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*service.command, "--port", str(port)],
            env={**os.environ, **peer.environment, **held},
            stdout=output,
            stderr=output,
            start_new_session=True,  # a process group of its own, to pause as one
        )
    try:
        url = f"http://127.0.0.1:{port}"
        answer = asyncio.run(_wait_until_ready(url + peer.ready_at, process))
        if answer is None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise PeerError(f"it does not answer at {url} ({log}):\n{tail}")
        model = service.model or answer["data"][0]["id"]
        # Each request has a connection of its own: not every peer says when it closes one.
        sampling = {"temperature": 0, **peer.no_eos}
        client = LoadClient(url, model, timeout=REQUEST_SECONDS, sampling=sampling, keep_alive=False)
        yield Server(peer, client, process, service.bits or _bits_in(log))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGCONT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> Any:
    """Returns what the server answers there, or None if it ended or took too long."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return await response.json()
            await asyncio.sleep(0.5)
    return None


def _bits_in(log: Path) -> float | None:
    """What Carousel says of itself when it starts."""
    found = re.search(r"([\d.]+) bits a weight", log.read_text(errors="replace"))
    return float(found[1]) if found else None
