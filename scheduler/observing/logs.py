"""Log lines: text for people, or one JSON object each for machines."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure(level: int | str, log_format: str) -> None:
    """Set up this process's logging. What a record carries as `extra` shows in JSON only."""
    handler = logging.StreamHandler()
    if log_format == "json":
        fields = {"levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=fields, timestamp="time")
        )
    else:
        handler.setFormatter(logging.Formatter(TEXT))
    logging.basicConfig(level=level, handlers=[handler])
