"""From a config to what runs it: the model, its arithmetic, its attention backend and its KV pool."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from scheduler.attention import AttentionBackend, choose_backend
from scheduler.config import EngineConfig
from scheduler.cuda_graphs import CudaGraphs
from scheduler.fused_model import FusedModel, Mode, can_fuse
from scheduler.kv_cache import KVCache, choose_num_blocks
from scheduler.messages import EngineInfo
from scheduler.model import PagedModel, UnsupportedModelError, choose_device, choose_dtype, load_model
from scheduler.packed_linear import obstacle, pack_linears
from scheduler.quantization import (
    MAX_COST,
    Cost,
    StepModel,
    perplexity,
    remember_cost,
    remembered_cost,
    text_tokens,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run steps."""

    model: StepModel
    cache: KVCache
    device: torch.device
    eos_token_ids: frozenset[int]
    info: EngineInfo


def load(config: EngineConfig, model_path: str) -> LoadedModel:
    """Load the model and allocate the pool.

    Raises `UnsupportedModelError`, `BackendError`, `KVCacheTooSmallError`, or transformers' OSError.
    """
    num_threads = config.threads or usable_cpus()
    torch.set_num_threads(num_threads)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    paged = load_model(model_path, device)
    backend = choose_backend(
        config.attention_backend,
        paged.layers,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
        num_threads=num_threads,
    )
    num_blocks = choose_num_blocks(config, paged.layers, model_max_len=paged.max_len, dtype=dtype, device=device)
    max_model_len = min(config.max_model_len or paged.max_len, num_blocks * config.block_size)
    model, arithmetic = _choose_execution(config, paged, backend, dtype, model_path, max_model_len, num_threads)
    spare_blocks = 0  # blocks that no sequence is given
    if config.cuda_graphs and device.type == "cuda" and backend.name == "flex":
        model = CudaGraphs(
            model,
            max_rows=config.max_num_seqs,
            table_width=-(-max_model_len // config.block_size),
            spare_block=num_blocks,
            block_size=config.block_size,
            device=device,
        )
        spare_blocks = 1
    cache = KVCache(
        paged.layers,
        backend,
        num_blocks=num_blocks + spare_blocks,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
    )
    info = EngineInfo(
        model=config.model,
        max_model_len=max_model_len,
        vocab_size=paged.vocab_size,
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=_name(dtype),
        device=str(device),
        attention_backend=backend.name,
        products=arithmetic,
    )
    logger.info(
        "%s on %s: %s products, %s attention, %d blocks of %d tokens in %s",
        config.model,
        info.device,
        info.products,
        info.attention_backend,
        num_blocks,
        config.block_size,
        info.dtype,
    )
    return LoadedModel(model, cache, device, paged.eos_token_ids, info)


def _choose_execution(
    config: EngineConfig,
    paged: PagedModel,
    backend: AttentionBackend,
    dtype: torch.dtype,
    model_path: str,
    max_model_len: int,
    num_threads: int,
) -> tuple[StepModel, str]:
    """The model as it will run, and the name of its products' arithmetic."""
    reason = obstacle(paged.device, dtype)
    if reason is not None:
        if config.quantization == "int8":
            raise UnsupportedModelError(f"--quantization int8: {reason}")
        paged.module.to(dtype)  # type: ignore[arg-type]
        return paged, _name(dtype)

    fused = config.fused and backend.name == "native" and can_fuse(paged)
    if not fused:
        paged.module.to(dtype)  # type: ignore[arg-type]

    def packed(mode: Mode) -> StepModel:
        if fused:
            return FusedModel(paged, mode, max_len=max_model_len, num_threads=num_threads)
        return pack_linears(paged, mode, num_threads)

    unquantized: Mode = "f32" if dtype == torch.float32 else "bf16"
    if config.quantization == "int8":
        return packed("int8"), "int8"
    if config.quantization == "none" or unquantized == "f32":
        return packed(unquantized), _name(dtype)

    cost = remembered_cost(model_path)
    if cost is None:
        logger.info("measuring what int8 costs this model (once)")
        tokens = text_tokens(model_path)
        cost = Cost(
            int8=perplexity(packed("int8"), backend, tokens, dtype),
            unquantized=perplexity(packed(unquantized), backend, tokens, dtype),
        )
        remember_cost(model_path, cost)
    if cost.share < MAX_COST:
        logger.info("--quantization auto takes int8: %s", cost)
        return packed("int8"), "int8"
    logger.info("--quantization auto leaves int8 alone: %s", cost)
    return packed(unquantized), _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def usable_cpus() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
