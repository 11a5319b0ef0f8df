"""Drives one OpenAI-compatible server, and notes when each token came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from types import MappingProxyType
from typing import Literal, Protocol

import aiohttp
import msgspec

from server.bench.workload import LoadRequest

GREEDY: Mapping[str, object] = MappingProxyType({"temperature": 0, "ignore_eos": True})
"""In a request's body: the likeliest tokens, `max_tokens` of them, so that all servers do the same work. But
answers that may not end go round in circles, and circles are easily guessed."""

CHAT: Mapping[str, object] = MappingProxyType({"temperature": 0.7})
"""In a request's body: as people ask. Answers end where the model ends them."""

Endpoint = Literal["completions", "chat"]
_PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


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
    text: str = ""
    """The answer."""
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


@dataclass(frozen=True, slots=True)
class LoadClient:
    """Sends requests to one server."""

    url: str
    model: str
    _: KW_ONLY
    endpoint: Endpoint = "completions"
    keys: Sequence[str] = ()
    """One API key for each user, or none."""
    timeout: float = 300
    """Seconds that a request may take."""
    sampling: Mapping[str, object] = field(default_factory=lambda: GREEDY)
    """What each request's body says of how tokens are chosen, and of where an answer ends."""
    keep_alive: bool = True
    """Use a connection again."""

    def chatting(self) -> LoadClient:
        """One that sends chats to the same server, whose answers end where the model ends them."""
        return replace(self, endpoint="chat", sampling=CHAT)

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
        connector = aiohttp.TCPConnector(limit=0, force_close=not self.keep_alive)
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        return aiohttp.ClientSession(connector=connector, timeout=timeout)

    def _body(self, request: LoadRequest) -> bytes:
        body: dict[str, object] = {
            **self.sampling,
            "model": self.model,
            "max_tokens": request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            system = [] if request.system is None else [{"role": "system", "content": request.system}]
            body["messages"] = [*system, {"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if request.seed is not None:
            body["seed"] = request.seed
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
        if self.keys:
            headers["Authorization"] = f"Bearer {self.keys[request.user]}"
        try:
            path = self.url.rstrip("/") + _PATHS[self.endpoint]
            async with session.post(path, data=self._body(request), headers=headers) as response:
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
        pieces: list[str] = []
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
                if piece := choice.text or (choice.delta is not None and choice.delta.content):
                    pieces.append(piece)
                    outcome.arrivals.append(time.perf_counter() - start)
        outcome.text = "".join(pieces)
        outcome.num_tokens = outcome.num_tokens or len(pieces)
