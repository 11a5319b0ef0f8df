"""What is no request at all, or one that no handler sees, is answered in OpenAI's error format too."""

from __future__ import annotations

import asyncio
import inspect
import re
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any

from aiohttp import HttpVersion11, StreamReader, hdrs, web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler

from server.http.connections import Connections
from server.http.errors import ApiError, error_response
from server.http.json import json_response
from server.http.sse import EVENTS

_PROBE = re.compile(r"(/[^?#]*)?/(health(/live|/ready)?|ping)")
"""Paths that are answered where no connection is left: who looks after the server must not take it for dead."""

HANDSHAKE_SECONDS = 30.0
"""For that of TLS."""


class Runner(web.AppRunner):
    """Runs an application whose connections speak JSON in all cases, and are so many at most; inside of TLS, if
    there is a context for it."""

    def __init__(
        self, app: web.Application, max_connections: int, tls: ssl.SSLContext | None = None, **options: Any
    ) -> None:
        super().__init__(app, **options)
        self._connections = Connections(max_connections)
        self._tls = tls

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        answer = made.request_handler

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            is_probe = _PROBE.fullmatch(request.path) is not None
            try:
                with self._connections.asked(request.protocol, always=is_probe):
                    return await answer(request)
            except ApiError as error:
                return error_response(error, request)

        return _Server(
            handle,
            self._connections,
            self._tls,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **made._kwargs,
        )


class _Server(web.Server):
    def __init__(self, handler: Any, connections: Connections, tls: ssl.SSLContext | None, **options: Any) -> None:
        super().__init__(handler, **options)
        self._all = connections
        self._tls = tls
        self._below: dict[RequestHandler, _Handshake] = {}
        """What connections are until their handshake is over."""

    def __call__(self) -> asyncio.BaseProtocol:  # type: ignore[override]
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        if self._tls is None:
            return connection
        below = self._below[connection] = _Handshake(self._loop, connection, self._tls, self._all)
        below.on_end = lambda: self._below.pop(connection, None)
        return below

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if (below := self._below.get(handler)) is not None:
            self._all.closed(below)
        self._all.opened(handler)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._all.closed(handler)


class _Handshake(SSLProtocol):
    """TLS below a connection, which asyncio's servers tell of only when the handshake is over. It counts as one on
    which nothing is asked from its first moment."""

    on_end: Callable[[], object]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: RequestHandler,
        context: ssl.SSLContext,
        connections: Connections,
    ) -> None:
        # Nobody waits for its end: what goes wrong is the client's business.
        options: Any = {"server_side": True, "ssl_handshake_timeout": HANDSHAKE_SECONDS}
        super().__init__(loop, connection, context, None, **options)  # type: ignore[arg-type]
        self._all = connections
        self._plain: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._plain = transport
        self._all.opened(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._all.closed(self)
        self.on_end()

    def force_close(self) -> None:
        if isinstance(self._plain, asyncio.Transport):
            self._plain.abort()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""An interim response, which says nothing here and which any client of HTTP/1.1 reads past (RFC 9110, 15.2)."""

SILENT_SECONDS = 0.5
"""How long a client that sends nothing more is sent nothing, before it is found out whether it still reads."""

LOOK_SECONDS = 0.1
"""Between two looks whether it answered with a reset."""


class _Connection(RequestHandler):
    _last_body: StreamReader = EMPTY_PAYLOAD
    """Of the last request that came."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages:
            self._last_body = self._messages[-1][1]

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more. It may still read, or be gone: that looks the same until something is
        sent to it, which one that is gone answers with a reset. So one that waits for an answer keeps its
        connection, and is sent something."""
        if self.transport is None or not (self._is_busy() and self._last_body.is_eof()):
            return False
        if self.transport.get_extra_info("sslcontext") is not None:  # asyncio ends TLS both ways at once
            return False
        self.close()  # after this answer
        self._loop.call_later(SILENT_SECONDS, self._probe)
        return True

    def _is_busy(self) -> bool:
        """Whether a request was read and is not answered yet."""
        if self._messages or self._current_request is not None:
            return True
        if self._waiter is not None or self._task_handler is None:
            return False
        serving: Any = self._task_handler.get_coro()
        return inspect.getcoroutinestate(serving) == inspect.CORO_SUSPENDED

    def _probe(self) -> None:
        request, transport = self._current_request, self.transport
        if request is None or transport is None:
            return
        if (events := request.get(EVENTS)) is not None:
            events.comment()
        elif request.version >= HttpVersion11 and request.writer.output_size == 0:
            transport.write(CONTINUE)
        self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """asyncio reads no more, and would see a reset only when it writes again."""
        if (transport := self.transport) is None or self._current_request is None:
            return
        if transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            transport.abort()
        else:
            self._loop.call_later(LOOK_SECONDS, self._look)

    def force_close(self) -> None:
        """At once: what is not sent yet is for somebody who does not read, and would be waited for."""
        transport = self.transport
        super().force_close()
        if transport is not None:
            transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Logged as before; a message that is no HTTP, or whose header is too long, has an answer in JSON."""
        super().handle_error(request, status, exc, message)
        said = "internal error; the server's log has it"
        if status < 500:
            said = (message or "this is no HTTP request").strip().splitlines()[0].rstrip(":")
        answer = json_response(ApiError(status, said, type=_type(status)).body, status=status)
        answer.force_close()
        return answer


def _type(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


async def refuse_expectations(request: web.Request) -> web.Response | None:
    """For routes: the handler of a request's Expect header."""
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # of the answer nothing is sent yet
        return None
    error = ApiError(417, f"Expect: {request.headers[hdrs.EXPECT][:40]} cannot be met")
    return error_response(error, request)
