"""The end of a server: new requests are refused, and those that run are finished."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from server.http.errors import ApiError

RETRY_SECONDS = 5
"""When to try again, of a server that is coming or going."""

logger = logging.getLogger(__name__)


def unready(message: str, code: str) -> ApiError:
    """Refuses a request that may be sent again soon, here or to another server."""
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


class Draining:
    """Counts the requests that ask for work, which all are POSTs; what looks on does not hold up the end."""

    def __init__(self) -> None:
        self.has_begun = False
        self._num_running = 0
        self._has_ended_all = asyncio.Event()
        self._has_ended_all.set()

    @property
    def is_idle(self) -> bool:
        """Whether none is being answered."""
        return self._num_running == 0

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != hdrs.METH_POST:
            return await handler(request)
        if self.has_begun:
            raise unready("the server is shutting down, and takes no new requests", "shutting_down")
        self._num_running += 1
        self._has_ended_all.clear()
        try:
            return await handler(request)
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._has_ended_all.set()

    async def finish(self, seconds: float) -> None:
        """Take no new requests, and return when those that run are finished, or after so many seconds."""
        self.has_begun = True
        if self._has_ended_all.is_set():
            return
        logger.info("finishing %d requests, for %.0f s at most; once more ends it now", self._num_running, seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._has_ended_all.wait()
        except TimeoutError:
            logger.warning("%d requests were not finished in %.0f s", self._num_running, seconds)


DRAINING = web.AppKey("draining", Draining)
