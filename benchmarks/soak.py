"""Chaos for half an hour: everything that clients and machines do to a server, at once, and what is left of it.

    python -m benchmarks.soak

A real server with the default model and users. Workers ask all endpoints; others cancel, disconnect, read slowly,
send what makes no sense, and come in bursts; the engine is killed, a user is disabled and enabled, and the file
system of the ledger is full for a while (a small tmpfs, where this process may mount one). At the end nothing may
be left: every request that was accepted got an end, no block, task, descriptor or thread is held, memory has not
grown, and the ledger has what the clients counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from tqdm import tqdm

from benchmarks.own_server import OwnServer, own_server
from server.users.file import set_disabled

SETTLE_SECONDS = 60.0
"""In which all that was begun has to be over, once nobody sends any more."""

WARM_UP = 0.3
"""Share of the time after which memory is looked at for the first time."""

KILL_EVERY, EDIT_EVERY, BURST_EVERY, FILL_EVERY = 45.0, 7.0, 13.0, 60.0
"""Seconds."""

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
WORDS = ("the sea", "a lighthouse", "bread", "stars", "a river", "winter", "the market", "an engine")


@dataclass
class Soaked:
    """The server, and what the clients know of it."""

    server: OwnServer
    small: Path
    """The file system that is full for a while."""
    outcomes: Counter[str] = field(default_factory=Counter)
    without_end: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    """Tokens of the user whose answers are all read to their end: of prompts, and of answers."""
    random: random.Random = field(default_factory=lambda: random.Random(14))

    def session(self, user: str = "steady", seconds: float = 120.0) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.server.url,
            headers={"Authorization": f"Bearer {self.server.keys[user]}"},
            timeout=aiohttp.ClientTimeout(total=seconds),
        )

    def text(self, length: int = 12) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(1, length)))


# What clients do ----------------------------------------------------------------------------------------


def wishes(soaked: Soaked) -> tuple[str, dict[str, Any]]:
    """An endpoint, and something to ask it."""
    text, seed = soaked.text(), soaked.random.randrange(1000)
    common: dict[str, Any] = {"max_tokens": soaked.random.randint(1, 60), "seed": seed}
    messages = [{"role": "user", "content": f"Tell me about {text}."}]
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    choices: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": text, **common}),
        ("/v1/completions", {"prompt": [text, "And"], "n": 2, **common, "logprobs": 2}),
        ("/v1/completions", {"prompt": text * 20, **common, "echo": True}),
        ("/v1/chat/completions", {"messages": messages, **common}),
        ("/v1/chat/completions", {"messages": messages, **common, "logprobs": True, "top_logprobs": 3}),
        ("/v1/chat/completions", {"messages": messages, **common, "response_format": format_}),
        ("/v1/chat/completions", {"messages": messages, **common, "tools": [TOOL], "tool_choice": "auto"}),
        ("/v1/chat/completions", {"messages": messages, **common, "frequency_penalty": 0.5, "top_p": 0.9}),
    ]
    path, body = soaked.random.choice(choices)
    if soaked.random.random() < 0.6:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return path, body


async def well_behaved(soaked: Soaked) -> None:
    """Read to the end, and count."""
    path, body = wishes(soaked)
    async with soaked.session() as session, session.post(path, json=body) as response:
        if response.status != 200:
            soaked.outcomes[f"{response.status} {path}"] += 1
            await response.read()
            return
        usage = None
        if body.get("stream"):
            is_whole = False
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    if "error" in event:
                        is_whole = True
                        soaked.outcomes[f"error event: {event['error']['message'][:60]}"] += 1
                is_whole = is_whole or line.startswith(b"data: [DONE]")
            if not is_whole:
                soaked.without_end.append(path)
        else:
            usage = (await response.json())["usage"]
        soaked.outcomes["answered"] += 1
        if usage is not None:
            soaked.counted["prompt"] += usage["prompt_tokens"]
            soaked.counted["completion"] += usage["completion_tokens"]


async def other_endpoints(soaked: Soaked) -> None:
    """Those that the ledger's count is not compared for."""
    text = soaked.text()
    requests: list[tuple[str, dict[str, Any] | None]] = [
        ("/v1/embeddings", {"input": [text, "b"]}),
        ("/v1/responses", {"input": text, "max_output_tokens": 16}),
        ("/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 16}),
        ("/tokenize", {"prompt": text}),
        ("/detokenize", {"tokens": [5, 6, 7]}),
        ("/v1/models", None),
        ("/v1/usage", None),
        ("/metrics", None),
        ("/health/ready", None),
        ("/load", None),
        ("/openapi.json", None),
    ]
    path, body = soaked.random.choice(requests)
    async with soaked.session("rude") as session:
        call = session.get(path) if body is None else session.post(path, json=body)
        async with call as response:
            await response.read()
            soaked.outcomes[f"{response.status} {path}"] += 1


async def disconnects(soaked: Soaked) -> None:
    """Leave in the middle: before the answer, or behind some of it."""
    path, body = wishes(soaked)
    body.update(stream=True, max_tokens=400, ignore_eos=True)
    async with soaked.session("rude") as session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(soaked.random.random() * 3), session.post(path, json=body) as response:
                await response.content.read(soaked.random.randrange(4000))
    soaked.outcomes["left"] += 1


async def reads_slowly(soaked: Soaked) -> None:
    path, body = wishes(soaked)
    body.update(stream=True, max_tokens=200, ignore_eos=True)
    async with soaked.session("rude") as session, session.post(path, json=body) as response:
        for _ in range(8):
            await response.content.read(200)
            await asyncio.sleep(0.5)
    soaked.outcomes["read slowly"] += 1


async def makes_no_sense(soaked: Soaked) -> None:
    """Each is refused in words, with a status of 4xx."""
    bodies: list[bytes] = [
        soaked.random.randbytes(soaked.random.randrange(200)),
        b"{" * soaked.random.randrange(1, 5000),
        b'{"prompt": ' + b"[" * 5000,
        json.dumps({"prompt": "a", "max_tokens": -1}).encode(),
        json.dumps({"prompt": "a", "temperature": "hot"}).encode(),
        json.dumps({"messages": "none"}).encode(),
        json.dumps({"prompt": [10**9]}).encode(),
        json.dumps({"prompt": "a", "guided_regex": "(" * 50}).encode(),
    ]
    path = soaked.random.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses"])
    headers = {"Content-Type": "application/json"}
    body = soaked.random.choice(bodies)
    async with soaked.session("rude") as session, session.post(path, data=body, headers=headers) as response:
        await response.read()
        is_refused = 400 <= response.status < 500
        soaked.outcomes["refused" if is_refused else f"not refused: {response.status}"] += 1


async def guest(soaked: Soaked) -> None:
    """A user who is disabled at times."""
    body = {"prompt": soaked.text(), "max_tokens": 8}
    async with soaked.session("guest") as session, session.post("/v1/completions", json=body) as response:
        await response.read()
        soaked.outcomes[f"{response.status} of the guest"] += 1


Act = Callable[[Soaked], Awaitable[None]]


async def again_and_again(act: Act, soaked: Soaked, end: float, pause: float) -> None:
    """One worker."""
    while time.monotonic() < end:
        try:
            await act(soaked)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            soaked.outcomes[f"{act.__name__}: {type(error).__name__}"] += 1
            soaked.without_end.append(f"{act.__name__}: {error!r}")
        await asyncio.sleep(pause * soaked.random.random())


async def burst(soaked: Soaked) -> None:
    await asyncio.gather(*(other_endpoints(soaked) for _ in range(32)), *(disconnects(soaked) for _ in range(16)))


# What the machine does ----------------------------------------------------------------------------------


async def every(seconds: float, end: float, act: Callable[[], Awaitable[None]]) -> None:
    while time.monotonic() + seconds < end:
        await asyncio.sleep(seconds)
        await act()


async def kill_engine(soaked: Soaked) -> None:
    engine = soaked.server.engine()
    if engine is not None:
        engine.send_signal(soaked.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
        soaked.outcomes["engine killed"] += 1


async def edit_users(soaked: Soaked) -> None:
    await asyncio.to_thread(set_disabled, soaked.server.users_file, "guest", soaked.random.random() < 0.5)


async def fill_disk(soaked: Soaked) -> None:
    """For a few seconds nothing can be written to the ledger's file system."""
    waste = soaked.small / "waste"

    def fill() -> None:
        with contextlib.suppress(OSError), waste.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    await asyncio.to_thread(fill)
    soaked.outcomes["disk filled"] += 1
    await asyncio.sleep(8)
    await asyncio.to_thread(waste.unlink, missing_ok=True)


# What is left -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """What the server and its engine hold when nobody asks for anything."""

    blocks: float
    running: float
    tasks: float
    descriptors: int
    threads: int
    megabytes: float
    """Of the server's process: the engine is another one after each kill."""


async def holding(soaked: Soaked) -> Holding:
    metric = soaked.server.metric
    process = psutil.Process(soaked.server.process.pid)
    return Holding(
        blocks=await metric("carousel_kv_cache_usage_ratio"),
        running=await metric("carousel_requests_running") + await metric("carousel_requests_waiting"),
        tasks=await metric("carousel_server_tasks"),
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        megabytes=process.memory_info().rss / 1e6,
    )


async def settled(soaked: Soaked) -> Holding:
    """When nothing runs any more, or it is too late for that."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(1)
        async with soaked.session() as session, session.get("/health/ready") as response:
            is_ready = response.status == 200
        held = await holding(soaked)
        if (is_ready and held.running == held.blocks == 0) or time.monotonic() > deadline:
            return held


async def ledger_of(soaked: Soaked) -> dict[str, int]:
    async with soaked.session() as session, session.get("/v1/usage") as response:
        total: dict[str, int] = (await response.json())["total"]
        return total


async def run(soaked: Soaked, minutes: float, has_small_disk: bool) -> list[str]:
    """Returns what is wrong in the end."""
    await asyncio.gather(*(well_behaved(soaked) for _ in range(8)))
    end = time.monotonic() + 60 * minutes
    before = await settled(soaked)
    workers = [
        *(again_and_again(well_behaved, soaked, end, 0.2) for _ in range(12)),
        *(again_and_again(disconnects, soaked, end, 0.5) for _ in range(4)),
        *(again_and_again(reads_slowly, soaked, end, 0.5) for _ in range(3)),
        *(again_and_again(makes_no_sense, soaked, end, 0.3) for _ in range(2)),
        *(again_and_again(other_endpoints, soaked, end, 0.3) for _ in range(3)),
        again_and_again(guest, soaked, end, 1.0),
        again_and_again(burst, soaked, end, 2 * BURST_EVERY),
        every(min(KILL_EVERY, 15 * minutes), end, lambda: kill_engine(soaked)),
        every(EDIT_EVERY, end, lambda: edit_users(soaked)),
    ]
    if has_small_disk:
        workers.append(every(min(FILL_EVERY, 20 * minutes), end, lambda: fill_disk(soaked)))
    memory: list[float] = []

    async def look() -> None:
        started = time.monotonic()
        with tqdm(total=round(60 * minutes), desc="soaking", unit="s", file=sys.stderr) as bar:
            while (now := time.monotonic()) < end:
                bar.update(round(now - started) - bar.n)
                if now - started > WARM_UP * 60 * minutes:
                    memory.append(psutil.Process(soaked.server.process.pid).memory_info().rss / 1e6)
                await asyncio.sleep(1)

    await asyncio.gather(look(), *workers)
    after = await settled(soaked)
    ledger = await ledger_of(soaked)
    return report(soaked, before, after, memory, ledger)


def report(
    soaked: Soaked, before: Holding, after: Holding, memory: list[float], ledger: dict[str, int]
) -> list[str]:
    for outcome, count in sorted(soaked.outcomes.items()):
        print(f"{count:7}  {outcome}")
    part = max(1, len(memory) // 5)
    first, last = statistics.median(memory[:part]), statistics.median(memory[-part:])
    growth = last / first - 1
    print(f"idle before: {before}")
    print(f"idle after:  {after}")
    print(f"memory of the server after warm-up: {first:.1f} MB, at the end {last:.1f} MB, {growth:+.1%}")
    told = {"prompt": ledger["prompt_tokens"], "completion": ledger["completion_tokens"]}
    print(f"the ledger has {told}, the clients counted {dict(soaked.counted)}")
    wrong = {
        "a request without an end": bool(soaked.without_end),
        "not refused, or 5xx": any(
            outcome.startswith(("not refused", "500", "502")) for outcome in soaked.outcomes
        ),
        "blocks held": after.blocks > 0 or after.running > 0,
        "tasks left": after.tasks > before.tasks,
        "descriptors left": after.descriptors > before.descriptors + 2,
        "threads left": after.threads > before.threads + 2,
        "memory grows": growth > 0.02,
        "the ledger is wrong": told != dict(soaked.counted),
    }
    for name, is_so in wrong.items():
        print(f"{'NO' if is_so else 'ok':3} {name}")
    for each in soaked.without_end[:10]:
        print(f"    without an end: {each}")
    return [name for name, is_so in wrong.items() if is_so]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A small file system, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        print("no tmpfs can be mounted here: the disk is never full", file=sys.stderr)
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def soaked_server() -> Iterator[tuple[Soaked, bool]]:
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        small_disk(small := Path(scratch) / "small") as is_mounted,
    ):
        flags = ["--ledger", f"{small}/ledger.sqlite3", "--kv-cache-memory", "64MB"]
        with own_server(*flags, users=dict.fromkeys(("steady", "rude", "guest"), 1.0)) as server:
            yield Soaked(server, small), is_mounted
            for line in server.log.splitlines():
                if "Traceback" in line or " ERROR " in line:
                    print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    args = parser.parse_args()
    with soaked_server() as (soaked, is_mounted):
        wrong = asyncio.run(run(soaked, args.minutes, is_mounted))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
