"""Log lines: text for people, or one JSON object each for machines."""

from __future__ import annotations

import logging
import re
from typing import Any

from pythonjsonlogger.json import JsonFormatter

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class OneLine(logging.Formatter):
    """What comes from outside may be in any message: it begins no line of its own, and says nothing to a terminal.
    The lines of a traceback are indented, so that none looks like the log's own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join("  " + escaped(line) for line in super().formatException(ei).split("\n"))


def escaped(text: str) -> str:
    """With control characters as Python writes them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def configure(level: int | str, log_format: str) -> None:
    """Set up this process's logging. What a record carries as `extra` shows in JSON only."""
    handler = logging.StreamHandler()
    if log_format == "json":
        fields = {"levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=fields, timestamp="time")
        )
    else:
        handler.setFormatter(OneLine(TEXT))
    logging.basicConfig(level=level, handlers=[handler])
