"""The carousel as it turns, for everybody who watches the page at `/`.

One broadcaster makes the frames for all pages. It works, and the engine reports to it, only while a page is open.
Each page takes the newest frame whenever it is ready for one: a slow page misses frames, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import statistics
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec

from scheduler.client.async_engine import AsyncEngine
from scheduler.client.background import keep_running
from scheduler.wire.messages import SeatView, StepStats
from server.http.json import encode

FRAME_SECONDS = 0.25
"""From one frame to the next."""

FRAMES_PER_MAP = 4
"""Only each fourth frame brings the map of the blocks, much its largest part."""

FRAMES_OF_SPEED = 4
"""Speeds and latencies are those of the last second."""


class Viewer(msgspec.Struct, frozen=True):
    """Whose page it is, on a server with users."""

    name: str
    colour: int


class Welcome(msgspec.Struct, frozen=True, tag_field="event", tag="welcome"):
    """The first event: what stays the same."""

    model: str
    num_seats: int
    num_blocks: int
    block_size: int
    products: str
    device: str
    viewer: Viewer | None


class Rider(msgspec.Struct, frozen=True):
    """Who sits on a seat, and how far they are."""

    seat: int
    colour: int
    request: str
    """The first characters of the answer's id, without what all ids begin with."""
    prompt: int
    computed: int
    answer: int
    limit: int
    """Tokens that the answer may have."""


class Group(msgspec.Struct, frozen=True):
    """Requests of one user that wait; on a server without users nobody knows whose they are."""

    colour: int | None
    count: int


class Blocks(msgspec.Struct, frozen=True):
    used: int
    cached: int
    map: str | None
    """Base64 of `BlockPool.map`, in some frames."""


class Latency(msgspec.Struct, frozen=True):
    """Seconds."""

    p50: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency | None:
        return cls(round(statistics.median(seconds), 4), round(max(seconds), 4)) if seconds else None


class Frame(msgspec.Struct, frozen=True, tag_field="event", tag="frame"):
    """One moment. Users are colours here, so that the same frame is right for everybody who looks."""

    riders: list[Rider]
    waiting: list[Group]
    blocks: Blocks
    tokens_per_second: float
    prompt_tokens_per_second: float
    guessed_tokens_per_second: float
    """Of the answers' tokens, those that were guessed and right."""
    ttft: Latency | None
    itl: Latency | None
    step: Latency | None
    error: str | None
    """Why the engine is not well."""


@dataclass(slots=True)
class _Interval:
    """What happened from one frame to the next."""

    seconds: float = FRAME_SECONDS
    num_sampled_tokens: int = 0
    num_prompt_tokens: int = 0
    num_guessed_tokens: int = 0
    steps: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)


class Live:
    """The broadcaster. `with_users`: a colour is a user, else a request."""

    def __init__(self, engine: AsyncEngine, *, with_users: bool) -> None:
        self._engine = engine
        self._with_users = with_users
        self._salt = secrets.token_bytes(32)
        self._num_pages = 0
        self._opened = asyncio.Event()
        self._closed = False
        self._turned = asyncio.Condition()
        self._frame = b""
        self._number = 0
        self._intervals: deque[_Interval] = deque(maxlen=FRAMES_OF_SPEED)

    def colour(self, name: str) -> int:
        """A number that stands for a name as long as this server runs, and that nobody can turn back into it."""
        digest = hashlib.blake2b(name.encode(), key=self._salt, digest_size=6).digest()
        return int.from_bytes(digest)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The newest frame whenever the caller is ready for another, until the server stops."""
        self._num_pages += 1
        self._opened.set()
        seen = self._number
        try:
            while not self._closed:
                if seen == self._number:
                    async with self._turned:
                        await self._turned.wait()
                else:
                    seen = self._number
                    yield self._frame
        finally:
            self._num_pages -= 1
            if self._num_pages == 0:
                self._opened.clear()

    async def close(self) -> None:
        """End all pages' streams: the server stops."""
        self._closed = True
        async with self._turned:
            self._turned.notify_all()

    async def run(self) -> None:
        """Make frames while somebody looks, until cancelled."""
        await keep_running("the live page", self._serve_pages)

    async def _serve_pages(self) -> None:
        while True:
            await self._opened.wait()
            await self._watch_engine()

    async def _watch_engine(self) -> None:
        await self._engine.watch(FRAME_SECONDS)
        self._intervals.clear()
        self._engine.listeners.append(self._on_step)
        self._engine.latency_listeners.append(self._on_token)
        try:
            await self._make_frames()
        finally:
            self._engine.listeners.remove(self._on_step)
            self._engine.latency_listeners.remove(self._on_token)
        await self._engine.watch(None)

    async def _make_frames(self) -> None:
        last = time.monotonic()
        while self._opened.is_set():
            self._intervals.append(_Interval())
            await asyncio.sleep(FRAME_SECONDS)
            now = time.monotonic()
            self._intervals[-1].seconds, last = now - last, now
            self._frame = encode(self._look(with_map=self._number % FRAMES_PER_MAP == 0))
            self._number += 1
            async with self._turned:
                self._turned.notify_all()

    def _on_step(self, step: StepStats) -> None:
        interval = self._intervals[-1]
        interval.num_sampled_tokens += step.num_sampled_tokens
        interval.num_prompt_tokens += step.num_prompt_tokens
        interval.num_guessed_tokens += step.num_accepted
        interval.steps.append(step.duration)

    def _on_token(self, seconds: float, is_first: bool) -> None:
        interval = self._intervals[-1]
        (interval.ttfts if is_first else interval.itls).append(seconds)

    def _look(self, *, with_map: bool) -> Frame:
        engine, recent = self._engine, self._intervals
        seconds = sum(interval.seconds for interval in recent)

        def per_second(counts: list[int]) -> float:
            return round(sum(counts) / seconds, 1)

        return Frame(
            riders=[self._rider(seat) for seat in engine.seats],
            waiting=[
                Group(self.colour(user) if self._with_users else None, count)
                for user, count in engine.waiting.items()
            ],
            blocks=Blocks(
                used=engine.state.num_used_blocks,
                cached=engine.state.num_cached_blocks,
                map=b64encode(engine.block_map).decode() if with_map else None,
            ),
            tokens_per_second=per_second([interval.num_sampled_tokens for interval in recent]),
            prompt_tokens_per_second=per_second([interval.num_prompt_tokens for interval in recent]),
            guessed_tokens_per_second=per_second([interval.num_guessed_tokens for interval in recent]),
            ttft=Latency.of([each for interval in recent for each in interval.ttfts]),
            itl=Latency.of([each for interval in recent for each in interval.itls]),
            step=Latency.of([each for interval in recent for each in interval.steps]),
            error=engine.error,
        )

    def _rider(self, seat: SeatView) -> Rider:
        return Rider(
            seat=seat.seat,
            colour=self.colour(seat.user if self._with_users else seat.request_id),
            request=short_id(seat.request_id),
            prompt=seat.num_prompt_tokens,
            computed=seat.num_computed_tokens,
            answer=seat.num_output_tokens,
            limit=seat.max_tokens,
        )


def short_id(request_id: str) -> str:
    """Enough of chatcmpl-0123456789abcdef... to tell it from the others; the page does the same."""
    return request_id.partition("-")[2][:8]
