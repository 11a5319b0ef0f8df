"""From a config to what runs it: the model, its arithmetic, its attention backend and its KV pool."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass

import torch

from scheduler.config import EngineConfig
from scheduler.container import cpu_quota
from scheduler.execution.cuda_graphs import CudaGraphs
from scheduler.execution.kv_cache import (
    KVCache,
    bytes_per_block,
    choose_num_blocks,
    group_layers,
    holdings,
    largest,
)
from scheduler.execution.step_model import StepModel
from scheduler.messages import EngineInfo
from scheduler.models.draft_model import LoadedDraft, open_draft
from scheduler.models.fused_weights import PLAIN_MODES
from scheduler.models.model_config import ModelConfig, UnsupportedModelError
from scheduler.models.opening import open_model
from scheduler.models.sources import Source
from scheduler.processor import instruction_set, multiplies_bfloat16

logger = logging.getLogger(__name__)


MOST_POSITIONS = 65_536
"""Where a sequence ends that goes on beyond its window: each position has a row in a table of angles."""


LEAST_BLOCK_BYTES = 4096
"""That a block counts where a model keeps no more for a long sequence than for a short one."""

FEWEST_BLOCKS = 4
"""In a window from which tokens can be dropped."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run steps."""

    model: StepModel
    cache: KVCache
    device: torch.device
    eos_token_ids: frozenset[int]
    info: EngineInfo
    draft: LoadedDraft | None = None
    """The draft model, where there is one."""


def load(config: EngineConfig, model_path: str) -> LoadedModel:
    """Load the model and allocate the pool.

    Raises `UnsupportedModelError`, `BackendError`, `KVCacheTooSmallError`, or transformers' OSError.
    """
    num_threads = config.threads or usable_cpus()
    torch.set_num_threads(num_threads)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    opened = open_model(config, model_path, device=device, dtype=dtype, num_threads=num_threads)
    model_config, source, backend = opened.config, opened.source, opened.backend
    groups = group_layers(source.layers)
    block_bytes = bytes_per_block(
        [source.layers[layer] for layer in largest(groups)], config.block_size, opened.kv_dtype
    )
    seats_bytes = 0
    if source.own is not None:
        _check_speculation(config)
        block_bytes += max(LEAST_BLOCK_BYTES, source.own.per_token * config.block_size)
        seats_bytes = source.own.per_seat * config.max_num_seqs
    draft = None
    if config.speculative_model is not None:
        draft = open_draft(config, model_path, groups, device=device, dtype=dtype, num_threads=num_threads)
        block_bytes += draft.block_bytes(config.block_size)
    num_blocks = choose_num_blocks(
        config,
        groups,
        block_bytes,
        model_max_len=model_config.max_len,
        device=device,
        seats_bytes=seats_bytes,
    )
    longest = holdings(config, groups, device).longest(num_blocks)
    max_model_len = min(config.max_model_len or model_config.max_len, longest)
    has_graphs = config.cuda_graphs and device.type == "cuda" and backend.name == "flex"
    cache = KVCache(
        source.layers,
        backend,
        num_blocks=num_blocks + has_graphs,  # graphs write what pads them into a block that no sequence is given
        block_size=config.block_size,
        dtype=opened.kv_dtype,
        device=device,
        groups=groups,
    )
    shift_obstacle = _shift_obstacle(config, source, model_config, max_model_len)
    shifted_len = 0 if shift_obstacle else max(max_model_len, min(8 * max_model_len, MOST_POSITIONS))
    model = opened.packed.model(max(max_model_len, shifted_len))
    if has_graphs:
        model = _with_graphs(
            model,
            config,
            num_groups=len(groups),
            max_model_len=max_model_len,
            spare_block=num_blocks,
            device=device,
        )
    info = EngineInfo(
        model=config.model,
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        num_blocks=num_blocks,
        block_size=config.block_size,
        pool_bytes=num_blocks * block_bytes + seats_bytes,
        kv_cache_dtype=_name(opened.kv_dtype),
        device=str(device),
        attention_backend=backend.name,
        products=_name(dtype) if source.obstacle or opened.mode in PLAIN_MODES.values() else opened.mode,
        weights_bytes=opened.packed.nbytes,
        instruction_set="" if source.obstacle else instruction_set(),
        eos_token_ids=sorted(model_config.eos_token_ids),
        hidden_size=model_config.text.hidden_size,
        pooling=model_config.pooling,
        context_shift=config.context_shift,
        shifted_len=shifted_len,
        shift_obstacle=shift_obstacle,
        sampling_defaults=model_config.sampling_defaults if config.generation_config == "auto" else {},
    )
    _announce(info, opened.packed.bits)
    loaded_draft = draft.load(num_blocks, config.block_size, max_model_len, device) if draft is not None else None
    return LoadedModel(model, cache, device, model_config.eos_token_ids, info, loaded_draft)


def _check_speculation(config: EngineConfig) -> None:
    """For a model that keeps what it has computed in its own way. Raises `UnsupportedModelError`."""
    flag = "--speculative ngram" if config.speculative == "ngram" else "--speculative-model"
    if config.speculative == "ngram" or config.speculative_model is not None:
        raise UnsupportedModelError(f"{flag}: this model keeps a state from which no token can be taken back")


def _shift_obstacle(config: EngineConfig, source: Source, model_config: ModelConfig, max_model_len: int) -> str:
    """Raises `UnsupportedModelError` where the engine is to do what it cannot."""
    obstacle = source.shift_obstacle
    if obstacle and not getattr(model_config.text, "rope_parameters", None):
        obstacle = "the positions of this model are not rotary: those of tokens that stay cannot be moved"
    if not obstacle and max_model_len < FEWEST_BLOCKS * config.block_size:
        obstacle = f"a window of {max_model_len} tokens is too small: it takes {FEWEST_BLOCKS} blocks"
    if obstacle and config.context_shift:
        raise UnsupportedModelError(f"--context-shift: {obstacle}")
    return obstacle


def _with_graphs(
    model: StepModel,
    config: EngineConfig,
    *,
    num_groups: int,
    max_model_len: int,
    spare_block: int,
    device: torch.device,
) -> StepModel:
    return CudaGraphs(
        model,
        max_rows=config.max_num_seqs,
        num_groups=num_groups,
        table_width=-(-max_model_len // config.block_size),
        spare_block=spare_block,
        block_size=config.block_size,
        device=device,
    )


def _announce(info: EngineInfo, bits: float) -> None:
    logger.info(
        "%s on %s: %s products, %.1f bits a weight, %d MB of weights, %s attention, %d blocks of %d tokens in %s",
        info.model,
        " ".join(part for part in (info.device, info.instruction_set) if part),
        info.products,
        bits,
        info.weights_bytes // 10**6,
        info.attention_backend,
        info.num_blocks,
        info.block_size,
        info.kv_cache_dtype,
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("--device cuda: torch sees no CUDA device here")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" or multiplies_bfloat16()
        name = "bfloat16" if fast else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def usable_cpus() -> int:
    """Cores that this process may use: those that it may run on, and no more than a container's quota is worth.

    A part of a core counts as one: the threads of a forward pass wait for each other, but a group that has used up
    its quota stops as a whole, so none of them has to wait for another that stands still.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))
