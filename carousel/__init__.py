"""Continuous batching for several people who share one machine: the Python API.

    from carousel import LLM, SamplingParams

Importing this loads nothing and changes nothing: what a name needs, torch among it, comes when the name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler.async_llm import AsyncLLM
    from scheduler.config import EngineConfig
    from scheduler.embedding import Embedding
    from scheduler.engine.stream import Delta
    from scheduler.engine.supervisor import EngineDeadError, EngineStartError
    from scheduler.llm import LLM, Completion, Result
    from scheduler.planning.deadline import DeadlineError
    from scheduler.request import FinishReason, InvalidRequestError
    from scheduler.sampling import GrammarKind, GrammarSpec
    from scheduler.sampling_params import SamplingParams
    from scheduler.step import TokenLogprobs

_HOMES = {
    "AsyncLLM": "scheduler.async_llm",
    "Completion": "scheduler.llm",
    "DeadlineError": "scheduler.planning.deadline",
    "Delta": "scheduler.engine.stream",
    "Embedding": "scheduler.embedding",
    "EngineConfig": "scheduler.config",
    "EngineDeadError": "scheduler.engine.supervisor",
    "EngineStartError": "scheduler.engine.supervisor",
    "FinishReason": "scheduler.request",
    "GrammarKind": "scheduler.sampling",
    "GrammarSpec": "scheduler.sampling",
    "InvalidRequestError": "scheduler.request",
    "LLM": "scheduler.llm",
    "Result": "scheduler.llm",
    "SamplingParams": "scheduler.sampling_params",
    "TokenLogprobs": "scheduler.step",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "DeadlineError",
    "Delta",
    "Embedding",
    "EngineConfig",
    "EngineDeadError",
    "EngineStartError",
    "FinishReason",
    "GrammarKind",
    "GrammarSpec",
    "InvalidRequestError",
    "Result",
    "SamplingParams",
    "TokenLogprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
