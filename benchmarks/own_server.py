"""A `carousel serve` of one's own for a benchmark, with users and their keys."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from scheduler.config import DEFAULT_MODEL
from server.bench.load import LoadClient
from server.users.file import add_user

CAROUSEL = Path(sys.executable).with_name("carousel")
START_SECONDS = 120


@dataclass(slots=True)
class OwnServer:
    """Where it is, and who may use it."""

    url: str
    metrics_url: str
    pid: int
    keys: dict[str, str] = field(default_factory=dict)

    def client(self) -> LoadClient:
        """Sends requests in the users' names."""
        return LoadClient(self.url, DEFAULT_MODEL, keys=list(self.keys.values()))

    async def metrics(self, name: str) -> dict[str, float]:
        """A metric's values by user, or under "" where it has no users."""
        async with aiohttp.ClientSession() as session, session.get(self.metrics_url) as response:
            text = await response.text()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    user = sample.labels.get("user", "")
                    values[user] = values.get(user, 0.0) + sample.value
        return values

    async def buckets(self, name: str) -> dict[float, float]:
        """A histogram's cumulative counts, by the bounds of its buckets."""
        async with aiohttp.ClientSession() as session, session.get(self.metrics_url) as response:
            text = await response.text()
        return {
            float(sample.labels["le"]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"{name}_bucket"
        }

    def memory(self) -> int:
        """Bytes that the server and its engine hold for themselves."""
        server = psutil.Process(self.pid)
        return sum(process.memory_info().rss for process in [server, *server.children()])


@contextmanager
def own_server(
    *flags: str, users: Mapping[str, float] | None = None, low: Collection[str] = ()
) -> Iterator[OwnServer]:
    """Start it, with users of the given weights if there are any, and stop it at the end. `low`: those among
    them who get what the others leave."""
    with tempfile.TemporaryDirectory(prefix="carousel-bench-") as folder:
        keys = {
            name: add_user(
                Path(folder) / "users.yaml",
                name,
                {"weight": weight, "priority": "low" if name in low else "normal"},
            )
            for name, weight in (users or {}).items()
        }
        command = [str(CAROUSEL), "serve", "--port", "0", "--metrics-port", "0", "--no-access-log", *flags]
        if keys:
            command += ["--users", f"{folder}/users.yaml"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield OwnServer(*_wait(process, log), process.pid, keys)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Until it serves; where, and where its metrics are."""
    deadline = time.monotonic() + START_SECONDS
    served = re.compile(r"^Serving .* at (http://\S+).*^Metrics: (\S+)", re.MULTILINE | re.DOTALL)
    while not (found := served.search(log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"carousel serve did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)
    return found[1], found[2]
