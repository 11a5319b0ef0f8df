"""A real Prometheus that scrapes one server every second, and what a test asks it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from ruamel.yaml import YAML

import dashboards

FOLDER = Path(dashboards.__file__).parent
RULES = FOLDER / "prometheus" / "rules.yml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="Prometheus is not installed (Debian: apt-get install prometheus)",
)


def read_yaml(file: Path) -> Any:
    return YAML(typ="safe").load(file)


def promtool(*arguments: str, input: str | None = None) -> None:
    """Run it; what it says is the failure's message."""
    done = subprocess.run(
        ["promtool", *arguments], input=input, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Prometheus:
    url: str

    async def until_ready(self) -> None:
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"{self.url}/-/ready") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.1)

    async def until(self, condition: str) -> None:
        """Wait until a comparison holds for some series."""
        async with asyncio.timeout(30):
            while not await self._get("query", {"query": condition}):
                await asyncio.sleep(0.1)

    async def values_since(self, expression: str, start: float, end: float) -> list[list[float]]:
        """Each series' values from `start` to `end`, one a second."""
        during = {"query": expression, "start": str(start), "end": str(end), "step": "1"}
        found = await self._get("query_range", during)
        return [[float(value) for _, value in series["values"]] for series in found]

    async def _get(self, what: str, parameters: Mapping[str, str]) -> list[Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/api/v1/{what}", params=parameters) as response,
        ):
            answer = await response.json()
            assert answer["status"] == "success", f"{parameters['query']}: {answer}"
            found: list[Any] = answer["data"]["result"]
            return found


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with our configuration and rules, but for `target` (host:port) and every second."""
    config = read_yaml(FOLDER / "prometheus" / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    YAML().dump(config, folder / "prometheus.yml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)
