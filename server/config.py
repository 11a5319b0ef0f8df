"""The knobs of `carousel serve`: every knob of the engine, and those of the HTTP side."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scheduler.config import EngineConfig

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Largest request body; far more than the longest prompt that any model here could read."""


class ServeConfig(EngineConfig):
    """The knobs of one server. Filled like `EngineConfig`, from the same flags, environment and file."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every interface."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""

    served_model_name: str | None = None
    """Name of the model in the API; by default the value of --model."""

    access_log: bool = True
    """Log one line for each request."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to log."""

    @property
    def model_name(self) -> str:
        """What clients put into `model`."""
        return self.served_model_name or self.model
