"""Asks a server over HTTP what the lines of a batch ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from server.batches.lines import Answer, Line

_BUSY = frozenset({429, 503})
_LONGEST_PAUSE_SECONDS = 60.0

PATIENCE_SECONDS = 900.0
"""How long a server may say that it is busy, with no answer in between, before it is taken to be out of order."""


class ServerGoneError(RuntimeError):
    """The server cannot be reached, left in the middle of an answer, or does nothing but refuse."""


class BatchClient:
    """Sends lines to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._last_answer = time.monotonic()

    async def ask(self, line: Line) -> Answer:
        """The server's answer; it is asked again later while it says that it is busy. Raises `ServerGoneError`."""
        while True:
            answer, pause = await self._send(line)
            if answer.status_code not in _BUSY:
                self._last_answer = time.monotonic()
                return answer
            if time.monotonic() - self._last_answer > PATIENCE_SECONDS:
                said = bytes(answer.body).decode(errors="replace")[:300]
                raise ServerGoneError(f"{self._url} has refused everything for {PATIENCE_SECONDS:.0f} s: {said}")
            await asyncio.sleep(pause)

    async def _send(self, line: Line) -> tuple[Answer, float]:
        """The answer, and how many seconds to wait before it is asked for again."""
        try:
            async with self._session.post(self._url + line.url, data=line.body) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerGoneError(f"{self._url} does not answer: {error or type(error).__name__}") from error
        request_id = response.headers.get("X-Request-Id", "")
        return Answer(response.status, request_id, _as_json(content)), _pause_of(response)


@asynccontextmanager
async def batch_client(url: str, key: str | None, *, concurrency: int) -> AsyncIterator[BatchClient]:
    """A client for up to `concurrency` lines at a time, in the name of whom the key belongs to."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=concurrency),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
    ) as session:
        yield BatchClient(session, url.rstrip("/"))


def _as_json(content: bytes) -> msgspec.Raw:
    """The body on one line; what is no JSON, as a proxy's page, becomes a string."""
    try:
        return msgspec.Raw(msgspec.json.format(content, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.Raw(msgspec.json.encode(content.decode(errors="replace")))


def _pause_of(response: aiohttp.ClientResponse) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", "1"))
    except ValueError:  # a date
        seconds = 1.0
    return min(max(seconds, 0.1), _LONGEST_PAUSE_SECONDS)
