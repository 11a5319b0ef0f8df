"""`carousel serve`: from a bound port to a clean end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector

from scheduler import garbage
from scheduler.client.async_engine import AsyncEngine, EngineStartError
from server.app import create_app
from server.app_keys import ENGINE
from server.config import ServeConfig
from server.http import access_log
from server.http.access_log import AccessLogger
from server.http.broken import ConnectionLog
from server.http.connections import most_connections
from server.http.draining import DRAINING
from server.http.metrics import create_metrics_app
from server.http.protocol import Runner
from server.http.tls import Certificate
from server.starting import create_starting_app

GRACE_SECONDS = 1.0
"""How long streams in flight may go on at the end; aiohttp waits this long twice before it cancels them."""

LINGER_SECONDS = 2.0
"""How long the rest of a body that was refused is still taken in, so that its sender comes to read the answer."""

BACKLOG = 1024
"""Connections that may wait to be accepted: a burst of clients is what this server is for."""

ACCEPTED_AT_ONCE = 4
"""Connections that the event loop takes before it turns to the streams: asyncio takes all that wait."""

METRICS_CONNECTIONS = 64
"""On the metrics' own port."""

UNSENT_BYTES = 16 * 1024
"""Of an answer, that the system may keep beyond what the client has room for: that nobody reads it shows soon."""

logger = logging.getLogger(__name__)


class CannotListenError(RuntimeError):
    """The address cannot be listened on; the message says what to do."""


class EngineLostError(RuntimeError):
    """There is no engine any more; the message says why."""


class Served(NamedTuple):
    """A server, and where it is to be found."""

    app: web.Application
    url: str
    metrics_url: str | None
    """That of the metrics' own port."""


async def serve(config: ServeConfig) -> None:
    """Serve until cancelled, and then finish what runs. Raises what `served` raises, and `EngineLostError`."""
    async with served(config) as server:
        _announce(config, server)
        engine = server.app[ENGINE]
        try:
            await engine.failed.wait()
        except asyncio.CancelledError:
            await server.app[DRAINING].finish(config.drain_timeout)
            raise
        raise EngineLostError(engine.error)


@asynccontextmanager
async def served(config: ServeConfig) -> AsyncIterator[Served]:
    """Serve within it. Where it cannot begin, raises `CannotListenError`, `UsersFileError`, `LedgerError`,
    `TlsError` or `EngineStartError`."""
    access_log.logger.disabled = not config.access_log
    max_connections = most_connections(config.max_connections)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    log = ConnectionLog(registry)
    async with AsyncExitStack() as stack:
        # The ports are taken before the model loads, so that nobody waits just to read that they are in use.
        listener = stack.enter_context(_bound(config.host, config.port, "--port"))
        if config.users is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            logger.warning("whoever reaches %s can use this server; --users FILE asks for keys", config.host)
        metrics = None
        if config.metrics_port is not None:
            metrics = stack.enter_context(_bound(config.metrics_host, config.metrics_port, "--metrics-port"))
            app = create_metrics_app(config, registry)
            await stack.enter_async_context(_running(app, metrics, log, METRICS_CONNECTIONS, access_log=None))
        tls = None
        if config.tls_certificate is not None and config.tls_key is not None:
            tls = await stack.enter_async_context(_certificate(config.tls_certificate, config.tls_key))
        engine = AsyncEngine(
            config,
            registry,
            chat_template=_text_of(config.chat_template),
            special_tokens_in_text=config.allow_special_tokens_in_text,
        )
        app = create_app(config, engine, registry)
        # Another socket of the same port: what connects is answered by the one or the other, and never refused.
        early = stack.enter_context(listener.dup())
        starting = create_starting_app(config.root_path)
        async with _running(starting, early, log, max_connections, access_log=None, tls=tls):
            running = _running(app, listener, log, max_connections, access_log=access_log.logger, tls=tls)
            await stack.enter_async_context(running)
        garbage.keep_what_is_there()
        stack.callback(logger.info, "stopping")
        of_metrics = None if metrics is None else _url("http", config.metrics_host, metrics)
        yield Served(app, _url("http" if tls is None else "https", config.host, listener), of_metrics)


def _text_of(template: Path | None) -> str | None:
    """Raises `EngineStartError`."""
    try:
        return None if template is None else template.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineStartError(f"--chat-template {template}: {error}") from error


@asynccontextmanager
async def _certificate(certificate: Path, key: Path) -> AsyncIterator[ssl.SSLContext]:
    """Follow the files within it. Raises `TlsError`."""
    tls = Certificate(certificate, key)
    watching = asyncio.create_task(tls.watch())
    try:
        yield tls.context
    finally:
        watching.cancel()


@asynccontextmanager
async def _running(
    app: web.Application,
    listener: socket.socket,
    log: ConnectionLog,
    max_connections: int,
    *,
    access_log: logging.Logger | None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[None]:
    """Serve an application on a bound socket. Raises `CannotListenError`."""
    runner = Runner(
        app,
        max_connections,
        tls,
        handler_cancellation=True,  # a client that leaves takes its request along
        shutdown_timeout=GRACE_SECONDS,
        access_log=access_log,
        access_log_class=AccessLogger,
        logger=log,
        auto_decompress=False,  # no body becomes larger than it was sent
        lingering_time=LINGER_SECONDS,
    )
    try:
        await runner.setup()
        with _explained(*listener.getsockname()[:2]):
            await web.SockSite(runner, listener, backlog=ACCEPTED_AT_ONCE).start()
            listener.listen(BACKLOG)
        yield
    finally:
        await runner.cleanup()


@contextmanager
def _bound(host: str, port: int, flag: str) -> Iterator[socket.socket]:
    """A socket that has the address, and does not listen yet. Raises `CannotListenError`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        with _explained(host, port, flag):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)  # for its connections
            listener.bind((host, port))
        yield listener


@contextmanager
def _explained(host: str, port: int, flag: str = "--port") -> Iterator[None]:
    """Turn the system's refusal into a sentence that helps."""
    try:
        yield
    except OSError as error:
        reason = f"cannot listen on {host} port {port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            reason += f"; stop what listens there, or choose another port with {flag} (0 takes a free one)"
        raise CannotListenError(reason) from error


def _announce(config: ServeConfig, where: Served) -> None:
    url = where.url
    print(f"Serving {config.model_name} at {url} (Ctrl-C stops it)", flush=True)
    body = '{"prompt": "Once upon a time", "max_tokens": 64, "stream": true}'
    key = ' -H "Authorization: Bearer $KEY"' if config.users is not None else ""
    print(f"Try it: curl -N {url}/v1/completions{key} -d '{body}'", flush=True)
    if where.metrics_url is not None:
        print(f"Metrics: {where.metrics_url}/metrics", flush=True)


def _url(scheme: str, host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}:{listener.getsockname()[1]}"
