"""The knobs of `EngineConfig` as keyword arguments, so that an editor completes them and a checker knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

from scheduler.config import EngineConfig


class Knobs(TypedDict, total=False):
    """Each is explained at the field of `EngineConfig` that has its name."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    generation_config: Literal["auto", "none"]
    device: Literal["auto", "cpu", "cuda"]
    max_num_seqs: int
    max_batched_tokens: int | None
    max_model_len: int | None
    block_size: int
    kv_cache_memory: int | str | None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16"]
    prefix_caching: bool
    share_prefixes: bool
    attention_backend: Literal["auto", "native", "flex", "torch"]
    speculative: Literal["auto", "off", "ngram"]
    context_shift: bool
    cuda_graphs: bool
    fused: bool
    quantization: Literal["auto", "none", "int8", "int4", "stored"]
    policy: Literal["fair", "priority", "fcfs"]
    output_token_price: float
    cached_token_price: float
    target_itl_ms: float | None
    longest_step_ms: float
    step_timeout: float | None
    trace: Path | str | None
    log_format: Literal["text", "json"]
    threads: int | None


def config_of(model: str | None, knobs: Knobs) -> EngineConfig:
    """Of the default model, if none is named. Raises `pydantic.ValidationError`."""
    given: dict[str, Any] = dict(knobs)
    return EngineConfig(**(given if model is None else given | {"model": model}))
