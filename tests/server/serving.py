"""A real `carousel serve` in a process of its own, and what a test asks about it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil
from openai import AsyncOpenAI, OpenAI

from scheduler.machine.processor import VARIABLE as CHOSEN_PROCESSOR

CAROUSEL = Path(sys.executable).with_name("carousel")
START_SECONDS = 120

Json = dict[str, Any]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without Carousel's own variables, but for the kernels' choice, plus `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == CHOSEN_PROCESSOR or not name.startswith("CAROUSEL_")
    }
    return kept | {"CAROUSEL_DRAIN_TIMEOUT": "0", **(extra or {})}


def carousel(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [CAROUSEL, *arguments],
        env=environment({"COLUMNS": "200", **(env or {})}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Server:
    """Runs `carousel serve --port 0` with more flags, from `with` to its end."""

    def __init__(self, log: Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        self._log = log
        self._command = [str(CAROUSEL), "serve", "--port", "0", *flags]
        self._env = environment(env)

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"^Serving .* at (https?://\S+)", self.log, re.MULTILINE)):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        self.url = found[1]
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGTERM)

    def stop(self, number: signal.Signals) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def engine_process(self) -> psutil.Process:
        (process,) = (each for each in psutil.Process(self.process.pid).children() if each.status() != "zombie")
        return process

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def get(self, path: str) -> tuple[int, Json]:
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: Any) -> tuple[int, Json]:
        """Send JSON, or bytes as they are."""
        content: Json = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with aiohttp.ClientSession() as session, session.post(self.url + path, **content) as response:
            return response.status, await response.json()

    async def metrics(self) -> str:
        async with aiohttp.ClientSession() as session, session.get(self.url + "/metrics") as response:
            return await response.text()

    async def metric(self, name: str) -> float:
        (value,) = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", await self.metrics(), re.MULTILINE)
        return float(value)

    async def until(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        async with asyncio.timeout(30):
            while await self.metric(name) != value:
                await asyncio.sleep(0.05)

    async def until_logged(self, text: str) -> None:
        """Requests are logged when they are over, which their clients may know first."""
        async with asyncio.timeout(10):
            while text not in self.log:
                await asyncio.sleep(0.02)

    async def until_idle(self) -> None:
        """Wait until nothing runs, nothing waits, and every block is back in the pool."""
        await self.until("carousel_requests_running", 0)
        await self.until("carousel_requests_waiting", 0)
        await self.until("carousel_kv_cache_usage_ratio", 0)
