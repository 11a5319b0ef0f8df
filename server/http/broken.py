"""Messages that are no HTTP: each leaves one line in the log, without a traceback, and is counted."""

from __future__ import annotations

import logging
from typing import Any

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError
from prometheus_client import CollectorRegistry, Counter

logger = logging.getLogger(__name__)


class ConnectionLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp writes its connections' troubles to. What is not the client's fault is logged as it is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(logger)
        self._broken = Counter(
            "carousel_bad_http_requests_total", "Messages that were no proper HTTP.", registry=registry
        )

    def debug(self, msg: object, *args: object, exc_info: Any = None, **options: Any) -> None:
        if not self._took(exc_info):
            super().debug(msg, *args, exc_info=exc_info, **options)

    def exception(self, msg: object, *args: object, exc_info: Any = True, **options: Any) -> None:
        if not self._took(exc_info):
            super().exception(msg, *args, exc_info=exc_info, **options)

    def _took(self, error: object) -> bool:
        """Count the client's own errors, and log them in a line; False for others."""
        if not isinstance(error, HttpProcessingError | RequestPayloadError):
            return False
        self._broken.inc()
        first_line = str(getattr(error, "message", error)).strip().partition("\n")[0]
        logger.info("a message that is no HTTP: %s", first_line[:200].encode("unicode_escape").decode())
        return True
