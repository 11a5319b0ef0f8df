"""Drives one OpenAI-compatible server, and notes when each token came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import aiohttp
import msgspec

from server.bench.workload import LoadRequest


class Bar(Protocol):
    """A progress bar: tqdm's."""

    def update(self) -> object: ...


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are in seconds after the start of the run."""

    user: int
    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each piece of the answer came: nearly always one token."""
    ended: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.ended - self.sent

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(slots=True)
class RunResult:
    """All outcomes of one run, in order of sending, and how long it took in seconds."""

    outcomes: list[Outcome]
    duration: float


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class LoadClient:
    """Sends requests to one server. `keys`: one API key for each user, or none. `no_eos`: what in a request's body
    keeps this server from ending an answer before its length, so that all servers do the same work. `keep_alive`:
    use a connection again."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        endpoint: str = "completions",
        keys: Sequence[str] = (),
        timeout: float = 300,
        no_eos: Mapping[str, object] = MappingProxyType({"ignore_eos": True}),
        keep_alive: bool = True,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._path = self.url + ("/v1/completions" if endpoint == "completions" else "/v1/chat/completions")
        self._is_chat = endpoint != "completions"
        self._keys = list(keys)
        self._no_eos = no_eos
        self._keep_alive = keep_alive
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def closed_loop(
        self, requests: Iterable[LoadRequest], concurrency: int, bar: Bar | None = None
    ) -> RunResult:
        """Keep `concurrency` requests in flight until there are no more, and all are answered."""
        queue = iter(requests)

        async def worker(session: aiohttp.ClientSession, start: float, outcomes: list[Outcome]) -> None:
            for request in queue:
                outcomes.append(await self._send(session, request, start, bar))

        async with self._session() as session:
            start = time.perf_counter()
            outcomes: list[Outcome] = []
            await asyncio.gather(*(worker(session, start, outcomes) for _ in range(concurrency)))
            return RunResult(outcomes, time.perf_counter() - start)

    async def open_loop(
        self,
        requests: Sequence[LoadRequest],
        times: Sequence[float],
        bar: Bar | None = None,
    ) -> RunResult:
        """Send each request at its time, however many are in flight."""

        async def send_at(
            session: aiohttp.ClientSession, request: LoadRequest, when: float, start: float
        ) -> Outcome:
            await asyncio.sleep(when - (time.perf_counter() - start))
            return await self._send(session, request, start, bar)

        async with self._session() as session:
            start = time.perf_counter()
            outcomes = await asyncio.gather(
                *(send_at(session, request, when, start) for request, when in zip(requests, times, strict=True))
            )
            return RunResult(list(outcomes), time.perf_counter() - start)

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, force_close=not self._keep_alive)
        return aiohttp.ClientSession(connector=connector, timeout=self._timeout)

    def _body(self, request: LoadRequest) -> bytes:
        text: dict[str, object] = (
            {"messages": [{"role": "user", "content": request.prompt}]}
            if self._is_chat
            else {"prompt": request.prompt}
        )
        body = {
            **text,
            **self._no_eos,
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(body)

    async def _send(
        self,
        session: aiohttp.ClientSession,
        request: LoadRequest,
        start: float,
        bar: Bar | None,
    ) -> Outcome:
        outcome = Outcome(request.user, sent=time.perf_counter() - start)
        headers = {"Content-Type": "application/json"}
        if self._keys:
            headers["Authorization"] = f"Bearer {self._keys[request.user]}"
        try:
            async with session.post(self._path, data=self._body(request), headers=headers) as response:
                if response.status != 200:
                    outcome.error = f"{response.status}: {(await response.text())[:200]}"
                else:
                    await self._read(response, outcome, start)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.ended = time.perf_counter() - start
        if outcome.error is None and not outcome.arrivals:
            outcome.error = "the answer had no tokens"
        if bar is not None:
            bar.update()
        return outcome

    async def _read(self, response: aiohttp.ClientResponse, outcome: Outcome, start: float) -> None:
        pieces = 0
        async for line in response.content:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            chunk = _decode_chunk(line[5:])
            if chunk.error is not None:
                outcome.error = str(chunk.error)
            if chunk.usage is not None:
                outcome.num_prompt_tokens = chunk.usage.prompt_tokens
                outcome.num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.text or (choice.delta is not None and choice.delta.content):
                    pieces += 1
                    outcome.arrivals.append(time.perf_counter() - start)
        outcome.num_tokens = outcome.num_tokens or pieces
