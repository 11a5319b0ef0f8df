"""Continuous batching for several people who share one machine: the Python API.

    from carousel import LLM, SamplingParams

Importing this loads nothing and changes nothing: what a name needs, torch among it, comes when the name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scheduler.async_llm import AsyncLLM
    from scheduler.client.stream import Delta
    from scheduler.client.supervisor import EngineDeadError, EngineStartError
    from scheduler.config import EngineConfig
    from scheduler.core.request import FinishReason, InvalidRequestError
    from scheduler.core.sampling import GrammarKind, GrammarSpec
    from scheduler.core.step import TokenLogprobs
    from scheduler.embedding import Embedding
    from scheduler.features.deadline import DeadlineError
    from scheduler.llm import LLM, Completion, Result
    from scheduler.sampling_params import SamplingParams

_HOMES = {
    "AsyncLLM": "scheduler.async_llm",
    "Completion": "scheduler.llm",
    "DeadlineError": "scheduler.features.deadline",
    "Delta": "scheduler.client.stream",
    "Embedding": "scheduler.embedding",
    "EngineConfig": "scheduler.config",
    "EngineDeadError": "scheduler.client.supervisor",
    "EngineStartError": "scheduler.client.supervisor",
    "FinishReason": "scheduler.core.request",
    "GrammarKind": "scheduler.core.sampling",
    "GrammarSpec": "scheduler.core.sampling",
    "InvalidRequestError": "scheduler.core.request",
    "LLM": "scheduler.llm",
    "Result": "scheduler.llm",
    "SamplingParams": "scheduler.sampling_params",
    "TokenLogprobs": "scheduler.core.step",
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
