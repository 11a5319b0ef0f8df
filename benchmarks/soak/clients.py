"""What clients do to the server that is soaked: what is right, what is rude, and what makes no sense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.own_server import OwnServer

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
        json.dumps({"prompt": "a", "max_tokens": -2}).encode(),
        json.dumps({"prompt": "a", "temperature": "hot"}).encode(),
        json.dumps({"messages": "none", "input": 7}).encode(),
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
