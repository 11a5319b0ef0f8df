"""What travels between the engine's process and the process that talks to clients, encoded with msgspec."""

from __future__ import annotations

from typing import Any

import msgspec

from scheduler.request import FinishReason, Request


class Launch(msgspec.Struct, frozen=True):
    """What the engine's process is told at its start."""

    config: dict[str, Any]
    """The validated EngineConfig, as JSON has it."""
    model_path: str
    requests_address: str
    outputs_address: str
    log_level: int


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request: Request


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None
    """Which of its sequences; None: all."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish the current step, then leave."""


ToEngine = AddRequest | AbortRequest | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token's log-probability (natural logarithm) and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class EngineState(msgspec.Struct, frozen=True, array_like=True):
    """How full the engine is between two steps."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of the block pool held by sequences, 0 to 1; a cached block nobody references counts as free."""


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """One step in figures."""

    duration: float
    """Seconds."""
    num_tokens: int
    """Tokens computed."""
    num_prompt_tokens: int
    """Those among them that clients sent (a resumed sequence's own tokens are not)."""
    num_cached_tokens: int
    """Prompt tokens that the prefix cache spared the sequences admitted in this step."""
    num_sampled_tokens: int
    num_preemptions: int


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """Sent once, when the engine is ready: what was loaded and how large the pool is."""

    model: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    dtype: str
    device: str
    attention_backend: str
    products: str
    """Arithmetic of the matrix products: int8, bfloat16, float16 or float32."""


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """Sent once, instead of `EngineInfo`, when the engine could not start; `message` is for the user."""

    message: str


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """What happened since the last such message; `step` is None if nothing was computed."""

    outputs: list[SequenceOutput]
    state: EngineState
    step: StepStats | None = None


FromEngine = EngineInfo | EngineFailed | StepOutputs
