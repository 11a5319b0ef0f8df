"""What is no request at all, or one that no handler sees, is answered in OpenAI's error format too."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler

from server.http.connections import Connections
from server.http.errors import ApiError
from server.http.json import json_response


class Runner(web.AppRunner):
    """Runs an application whose connections speak JSON in all cases, and are so many at most."""

    def __init__(self, app: web.Application, max_connections: int, **options: Any) -> None:
        super().__init__(app, **options)
        self._connections = Connections(max_connections)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        answer = made.request_handler

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                with self._connections.asked(request.protocol):
                    return await answer(request)
            except ApiError as error:
                return json_response(error.body, status=error.status, headers=error.headers)

        return _Server(
            handle,
            self._connections,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **made._kwargs,
        )


class _Server(web.Server):
    def __init__(self, handler: Any, connections: Connections, **options: Any) -> None:
        super().__init__(handler, **options)
        self._all = connections

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._all.opened(handler)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._all.closed(handler)


class _Connection(RequestHandler):
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
    return json_response(error.body, status=417)
