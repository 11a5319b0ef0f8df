"""TLS: the certificate and its key, read again when they change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from server.private import check_regular

LOOK_SECONDS = 1.0
"""Between two looks at the files."""

logger = logging.getLogger(__name__)


class TlsError(ValueError):
    """The certificate or its key cannot be used; the message says why."""


class Certificate:
    """Connections that come after a change are given the new certificate; those that are there keep theirs."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises `TlsError`."""
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._files = certificate, key
        self._stamp = self._load()

    async def watch(self) -> None:
        """Without an end. Files that cannot be used leave the old certificate in its place."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if await asyncio.to_thread(self._look) != self._stamp:
                    self._stamp = await asyncio.to_thread(self._load)
                    logger.info("%s was read again", self._files[0])
            except (OSError, TlsError) as error:
                logger.warning("the certificate stays as it was: %s", error)

    def _look(self) -> tuple[tuple[int, int], ...]:
        for file in self._files:
            check_regular(file)
        stats = [file.stat() for file in self._files]
        return tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)

    def _load(self) -> tuple[tuple[int, int], ...]:
        certificate, key = self._files
        try:
            stamp = self._look()
            # First into a context of no use: one that fails halfway would have the certificate without its key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
            self.context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise TlsError(f"--tls-certificate {certificate} with --tls-key {key}: {reason}") from error
        return stamp


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not")
