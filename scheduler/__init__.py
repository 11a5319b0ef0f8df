"""Carousel's engine: continuous batching over a paged KV cache. It knows nothing of HTTP.

The heavy names are imported on first use, so that planning code and the HTTP process never load torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from scheduler.config import EngineConfig
from scheduler.machine.processor import hold_libraries
from scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from scheduler.client.async_engine import AsyncEngine
    from scheduler.llm import LLM

# torch's OpenMP threads (libgomp) spin for milliseconds while they wait for each other. On a machine that also
# runs an HTTP server and its clients, a spinning thread keeps its core from the very thread that it waits for,
# and a step takes twice as long or more. libgomp reads this when torch is imported, so it is set here, before.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
hold_libraries()

__all__ = ["LLM", "AsyncEngine", "EngineConfig", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from scheduler.llm import LLM

        return LLM
    if name == "AsyncEngine":
        from scheduler.client.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
