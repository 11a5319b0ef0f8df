"""A `carousel serve` of one's own for a benchmark, with users and their keys."""

from __future__ import annotations

import contextlib
import os
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
from prometheus_client.samples import Sample

from scheduler.config import DEFAULT_MODEL
from server.bench.load import LoadClient
from server.users.file import add_user

CAROUSEL = Path(sys.executable).with_name("carousel")
START_SECONDS = 120

END_SECONDS = 60
"""It finishes what runs first."""

LOG, USERS, TEMPORARY = "log", "users.yaml", "temporary"


@dataclass(slots=True)
class OwnServer:
    """Where it is, and who may use it."""

    url: str
    metrics_url: str
    process: subprocess.Popen[bytes]
    folder: Path
    """Where it has its log, its users file, and what is temporary."""
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.folder / LOG).read_text()

    @property
    def users_file(self) -> Path:
        return self.folder / USERS

    @property
    def temporary(self) -> Path:
        """The folder of its temporary files."""
        return self.folder / TEMPORARY

    def engine(self) -> psutil.Process | None:
        """The engine's process, if there is one now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                if child.status() != psutil.STATUS_ZOMBIE:
                    return child
        return None

    def client(self) -> LoadClient:
        """Sends requests in the users' names, whose answers have the wanted length."""
        return LoadClient(self.url, DEFAULT_MODEL, keys=list(self.keys.values()))

    def chats(self) -> LoadClient:
        """Sends chats in the users' names, whose answers end where the model ends them."""
        return self.client().chatting()

    async def metrics(self, name: str) -> dict[str, float]:
        """A metric's values by user, or under "" where it has no users."""
        values: dict[str, float] = {}
        for sample in await self._samples(name):
            user = sample.labels.get("user", "")
            values[user] = values.get(user, 0.0) + sample.value
        return values

    async def metric(self, name: str) -> float:
        """A metric's value, over all its labels."""
        return sum((await self.metrics(name)).values())

    async def buckets(self, name: str) -> dict[float, float]:
        """A histogram's cumulative counts, by the bounds of its buckets."""
        return {float(sample.labels["le"]): sample.value for sample in await self._samples(f"{name}_bucket")}

    async def _samples(self, name: str) -> list[Sample]:
        async with aiohttp.ClientSession() as session, session.get(self.metrics_url) as response:
            text = await response.text()
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples if sample.name == name]

    def memory(self) -> int:
        """Bytes that the server and its engine hold for themselves."""
        server = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [server, *server.children()])


@contextmanager
def own_server(
    *flags: str, users: Mapping[str, float] | None = None, low: Collection[str] = ()
) -> Iterator[OwnServer]:
    """Start it, with users of the given weights if there are any, and stop it at the end. `low`: those among
    them who get what the others leave."""
    with tempfile.TemporaryDirectory(prefix="carousel-bench-") as scratch:
        folder = Path(scratch)
        (folder / TEMPORARY).mkdir()
        keys = {
            name: add_user(
                folder / USERS,
                name,
                {"weight": weight, "priority": "low" if name in low else "normal"},
            )
            for name, weight in (users or {}).items()
        }
        command = [str(CAROUSEL), "serve", "--port", "0", "--metrics-port", "0", "--no-access-log", *flags]
        if keys:
            command += ["--users", f"{folder / USERS}"]
        log = folder / LOG
        environment = {**os.environ, "TMPDIR": str(folder / TEMPORARY)}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            yield OwnServer(*_wait(process, log), process, folder, keys)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(END_SECONDS)


def _wait(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Until it serves; where, and where its metrics are."""
    deadline = time.monotonic() + START_SECONDS
    served = re.compile(r"^Serving .* at (http://\S+).*^Metrics: (\S+)", re.MULTILINE | re.DOTALL)
    while not (found := served.search(log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"carousel serve did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)
    return found[1], found[2]
