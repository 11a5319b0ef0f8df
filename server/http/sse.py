"""Answers that grow: server-sent events as OpenAI has them, events with names, or lines of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Self

import msgspec
from aiohttp import web

from server.app_keys import CONFIG
from server.http.json import Answer, encode
from server.http.record import RequestRecord, record_of

PULSE_SECONDS = 10.0
"""Proxies end a connection on which nothing comes; most of them after a minute."""

PIECE = 1 << 16
"""Bytes of an answer in one piece that are sent at a time."""

_AT_ONCE = struct.pack("ii", 1, 0)

logger = logging.getLogger(__name__)


class StalledStreamError(ConnectionError):
    """Nobody reads the stream; its connection has been ended."""


class EventStream:
    """A response that grows event by event: server-sent ones, a JSON object each, and `[DONE]` at the end. Each
    leaves at once, or waits until the client reads on; if it does not, sending raises `StalledStreamError`."""

    MEDIA: ClassVar[str] = "text/event-stream"

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response
        self._patience = request.app[CONFIG].stalled_stream_seconds
        self._last_sent = time.monotonic()
        self._comments: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, request: web.Request) -> EventStream:
        """Send the headers: from here on the status is 200, whatever happens."""
        headers = {
            "Content-Type": f"{cls.MEDIA}; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # nginx would collect the events otherwise
        }
        events: EventStream = await cls._opened(request, web.StreamResponse(headers=headers))
        request[EVENTS] = events
        return events

    @classmethod
    async def whole(cls, request: web.Request, body: Answer) -> web.StreamResponse:
        """Send an answer in one piece, as it is read."""
        data = memoryview(encode(body))
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        response.content_length = len(data)
        stream = await cls._opened(request, response)
        with contextlib.suppress(StalledStreamError):  # there is no connection any more, and no seat to give back
            for start in range(0, len(data), PIECE):
                await stream.write(data[start : start + PIECE])
            await stream.close()
        return response

    @classmethod
    async def _opened(cls, request: web.Request, response: web.StreamResponse) -> Self:
        await response.prepare(request)
        if request.transport is not None:  # what the system does not take is what the client does not read
            request.transport.set_write_buffer_limits(high=0)
        return cls(request, response)

    async def send(self, event: msgspec.Struct) -> None:
        await self.send_json(encode(event))

    async def send_json(self, event: bytes) -> None:
        await self.write(b"data: %b\n\n" % event)

    async def end(self) -> None:
        """Say that nothing more comes."""
        await self.write(b"data: [DONE]\n\n")

    async def close(self) -> web.StreamResponse:
        async with self._stall_ends():
            await self._response.write_eof()
        return self._response

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Within it, a comment goes out whenever nothing else did for a while."""
        pulse = asyncio.create_task(self._pulse())
        try:
            yield
        finally:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._last_sent + PULSE_SECONDS - time.monotonic()))
            if time.monotonic() - self._last_sent >= PULSE_SECONDS:
                await self._comment()

    async def _comment(self) -> None:
        await self.write(b": %b\n\n" % _progress(record_of(self._request)).encode())

    def comment(self) -> None:
        """Send something that says nothing, now."""

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                await self._comment()

        self._comments.add(task := asyncio.create_task(send()))
        task.add_done_callback(self._comments.discard)

    async def write(self, data: bytes | memoryview) -> None:
        """As it is."""
        self._last_sent = time.monotonic()
        async with self._stall_ends():
            await self._response.write(data)
            await self._request.writer.drain()  # `write` alone waits only after each 64 KiB

    @asynccontextmanager
    async def _stall_ends(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._patience):
                yield
        except TimeoutError:
            request, transport = self._request, self._request.transport
            path, request_id = request.rel_url.raw_path, record_of(request).request_id
            logger.info("%s: nobody has read the stream for %g s [%s]", path, self._patience, request_id)
            if transport is not None:
                # With a reset: the system would else go on trying to send what nobody reads.
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                transport.abort()
            raise StalledStreamError("nobody reads the stream") from None


class UnmarkedEvents(EventStream):
    """Events without a mark at the end."""

    async def end(self) -> None: ...


class NamedEvents(UnmarkedEvents):
    """Events that say their `type` before their data too."""

    async def send(self, event: msgspec.Struct) -> None:
        kind: str = event.type  # type: ignore[attr-defined]
        await self.write(b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(event)))


class JsonLines(UnmarkedEvents):
    """A JSON object a line, and nothing else: there is no comment in it."""

    MEDIA = "application/x-ndjson"

    async def _pulse(self) -> None: ...

    async def _comment(self) -> None: ...

    async def send(self, event: msgspec.Struct) -> None:
        await self.write(encode(event) + b"\n")


def _progress(record: RequestRecord) -> str:
    """Where an answer is that does not come: an agent's first prompt takes minutes on a small machine."""
    if 0 < record.computed_tokens < record.prompt_tokens:
        return f"{record.computed_tokens} of {record.prompt_tokens} tokens of the prompt are computed"
    return "waiting"


EVENTS: web.RequestKey[EventStream] = web.RequestKey("events", EventStream)
"""Of a request whose answer is a stream."""
