"""`carousel serve`: from a bound port to a clean end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector

from scheduler.async_engine import AsyncEngine
from server import access_log
from server.app import create_app
from server.config import ServeConfig

GRACE_SECONDS = 1.0
"""How long streams in flight may go on at the end; aiohttp waits this long twice before it cancels them."""

BACKLOG = 1024
"""Connections that may wait to be accepted: a burst of clients is what this server is for."""

logger = logging.getLogger(__name__)


class CannotListenError(RuntimeError):
    """The address cannot be listened on; the message says what to do."""


async def serve(config: ServeConfig) -> None:
    """Serve until cancelled. Where it cannot begin, raises `CannotListenError`, `UsersFileError`, `LedgerError` or
    `EngineStartError`."""
    access_log.logger.disabled = not config.access_log
    # The port is taken before the model loads, so that nobody waits just to read that it is in use.
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        with _explained(config):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((config.host, config.port))
        if config.users is None and not _is_loopback(listener.getsockname()[0]):
            logger.warning("whoever reaches %s can use this server; --users FILE asks for keys", config.host)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        runner = web.AppRunner(
            create_app(config, AsyncEngine(config, registry), registry),
            handler_cancellation=True,  # a client that leaves takes its request along
            shutdown_timeout=GRACE_SECONDS,
            access_log=access_log.logger,
            access_log_class=access_log.AccessLogger,
        )
        try:
            await runner.setup()
            with _explained(config):
                await web.SockSite(runner, listener, backlog=BACKLOG).start()
            _announce(config, listener.getsockname()[1])
            await asyncio.Event().wait()
        finally:
            logger.info("stopping")
            await runner.cleanup()


@contextmanager
def _explained(config: ServeConfig) -> Iterator[None]:
    """Turn the system's refusal into a sentence that helps."""
    try:
        yield
    except OSError as error:
        reason = f"cannot listen on {config.host} port {config.port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            reason += "; stop what listens there, or choose another port with --port (0 takes a free one)"
        raise CannotListenError(reason) from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _announce(config: ServeConfig, port: int) -> None:
    url = f"http://[{config.host}]:{port}" if ":" in config.host else f"http://{config.host}:{port}"
    print(f"Serving {config.model_name} at {url} (Ctrl-C stops it)", flush=True)
    body = '{"prompt": "Once upon a time", "max_tokens": 64, "stream": true}'
    key = ' -H "Authorization: Bearer $KEY"' if config.users is not None else ""
    print(f"Try it: curl -N {url}/v1/completions{key} -d '{body}'", flush=True)
