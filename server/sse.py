"""Server-sent events, as OpenAI words them: one JSON object each, and `[DONE]` at the end."""

from __future__ import annotations

from typing import Self

import msgspec
from aiohttp import web

from server.openai_responses import encode


class EventStream:
    """A response that grows event by event. Each event leaves at once."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    @classmethod
    async def open(cls, request: web.Request) -> Self:
        """Send the headers: from here on the status is 200, whatever happens."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would collect the events otherwise
            }
        )
        await response.prepare(request)
        return cls(response)

    async def send(self, event: msgspec.Struct) -> None:
        await self.send_json(encode(event))

    async def send_json(self, event: bytes) -> None:
        await self._response.write(b"data: %b\n\n" % event)

    async def done(self) -> None:
        await self._response.write(b"data: [DONE]\n\n")

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response
