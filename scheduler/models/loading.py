"""From a config to what runs it: the model, its arithmetic, its attention backend and its KV pool."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
from dataclasses import dataclass

import torch

from scheduler.config import EngineConfig
from scheduler.core.kv_cache import KVCache, LayerGroup, largest
from scheduler.core.model import StepModel
from scheduler.execution.cuda_graphs import CudaGraphs
from scheduler.execution.step_model import OwnState
from scheduler.machine.container import cpu_quota
from scheduler.machine.processor import instruction_set, multiplies_bfloat16
from scheduler.models.memory import bytes_per_block, choose_num_blocks, group_layers, holdings, pool_memory
from scheduler.models.model_config import ModelConfig, UnsupportedModelError
from scheduler.models.opening import OpenedModel, open_model
from scheduler.models.packed import Source
from scheduler.models.products import PLAIN_MODES
from scheduler.wire.messages import EngineInfo

logger = logging.getLogger(__name__)


MOST_POSITIONS = 65_536
"""Where a sequence ends that goes on beyond its window: each position has a row in a table of angles."""


LEAST_BLOCK_BYTES = 4096
"""That a block counts where a model keeps no more for a long sequence than for a short one."""

STATES_PER_SEAT = 2
"""That can be put aside: behind a prompt, and behind the last full block of its answer."""

STATES_SHARE = 1 / 8
"""Of the memory, at most."""

FEWEST_BLOCKS = 4
"""In a window from which tokens can be dropped."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do here. All of it is decided when it is loaded; `EngineInfo` tells of it."""

    max_model_len: int
    """Tokens of prompt and answer."""
    num_blocks: int
    block_size: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    shifted_len: int | None
    """How long answers get that go on beyond the window; None: they cannot."""
    is_native: bool
    """Whether the native decoder's products and scans are there."""
    keeps_state: bool
    """Whether sequences have more than what is in the pool: no token can be taken back, and what one computed is
    of use to another only with a state that was put aside."""
    num_state_slots: int
    """For these."""
    long_after: int | None
    """Tokens of the longest text that is not long, of a model that has other positions for long ones."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run steps."""

    model: StepModel
    cache: KVCache
    device: torch.device
    can: Capabilities
    info: EngineInfo


def load(config: EngineConfig, model_path: str) -> LoadedModel:
    """Load the model and allocate the pool.

    Raises `UnsupportedModelError`, `BackendError`, `KVCacheTooSmallError`, or transformers' OSError.
    """
    num_threads = config.threads or usable_cpus()
    torch.set_num_threads(num_threads)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    opened = open_model(config, model_path, device=device, dtype=dtype, num_threads=num_threads)
    _give_back_memory()
    keeps_state = opened.source.own is not None
    if keeps_state and config.speculative == "ngram":
        raise UnsupportedModelError(
            "--speculative ngram: this model keeps a state from which no token can be taken back"
        )
    if opened.max_len < opened.config.full_len:
        logger.warning(
            "sequences end at %d tokens, and not at %d: beyond that this model's positions change with the length "
            "of the text, and with them all that was computed before",
            opened.max_len,
            opened.config.full_len,
        )
    groups = group_layers(opened.source.layers)
    pool = _divide_memory(config, opened, groups, device)
    has_graphs = (
        config.cuda_graphs
        and device.type == "cuda"
        and opened.backend.name == "flex"
        and not keeps_state
        and opened.source.long_after is None  # which rows are of long texts is no tensor of a graph
    )
    cache = KVCache(
        opened.source.layers,
        opened.backend,
        num_blocks=pool.num_blocks + has_graphs,  # graphs write what pads them into a block no sequence is given
        block_size=config.block_size,
        dtype=opened.kv_dtype,
        device=device,
        groups=groups,
    )
    obstacle = _shift_obstacle(config, opened.source, opened.config, pool.max_model_len)
    can = Capabilities(
        max_model_len=pool.max_model_len,
        num_blocks=pool.num_blocks,
        block_size=config.block_size,
        vocab_size=opened.config.vocab_size,
        eos_token_ids=opened.config.eos_token_ids,
        shifted_len=None if obstacle else max(pool.max_model_len, min(8 * pool.max_model_len, MOST_POSITIONS)),
        is_native=opened.source.obstacle is None,
        keeps_state=keeps_state,
        num_state_slots=pool.num_state_slots,
        long_after=opened.source.long_after,
    )
    model = opened.packed.model
    if has_graphs:
        model = CudaGraphs(
            model,
            max_rows=config.max_num_seqs,
            num_groups=len(groups),
            table_width=-(-can.max_model_len // config.block_size),
            spare_block=pool.num_blocks,
            block_size=config.block_size,
            device=device,
        )
    model.bind(cache, max(can.max_model_len, can.shifted_len or 0))
    info = _describe(config, opened, can, obstacle, pool.nbytes, device, dtype)
    _announce(info, opened.packed.bits)
    return LoadedModel(model, cache, device, can, info)


def _give_back_memory() -> None:
    """What a first load took for its checks and has freed: glibc keeps it, and nothing needs as much again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True, slots=True)
class _Pool:
    """How large it is, and what a sequence can have of it."""

    num_blocks: int
    nbytes: int
    """With what the seats take that is no block, and states that are put aside."""
    max_model_len: int
    num_state_slots: int


def _divide_memory(
    config: EngineConfig,
    opened: OpenedModel,
    groups: list[LayerGroup],
    device: torch.device,
) -> _Pool:
    """Raises `UnsupportedModelError` or `KVCacheTooSmallError`."""
    source = opened.source
    layers = [source.layers[layer] for layer in largest(groups)]
    block_bytes = bytes_per_block(layers, config.block_size, opened.kv_dtype)
    seats_bytes = num_state_slots = 0
    if source.own is not None:
        block_bytes = max(LEAST_BLOCK_BYTES, block_bytes + source.own.per_token * config.block_size)
        num_state_slots = _num_state_slots(config, source.own, pool_memory(config, device))
        seats_bytes = source.own.per_seat * config.max_num_seqs + source.own.per_slot * num_state_slots
    model_max_len = opened.max_len
    num_blocks = choose_num_blocks(
        config, groups, block_bytes, model_max_len=model_max_len, device=device, seats_bytes=seats_bytes
    )
    longest = holdings(config, groups, device).longest(num_blocks)
    return _Pool(
        num_blocks=num_blocks,
        nbytes=num_blocks * block_bytes + seats_bytes,
        max_model_len=min(config.max_model_len or model_max_len, longest),
        num_state_slots=num_state_slots,
    )


def _num_state_slots(config: EngineConfig, own: OwnState, memory: int) -> int:
    """How many states can be put aside."""
    if not config.prefix_caching or own.per_slot == 0:
        return 0
    return min(STATES_PER_SEAT * config.max_num_seqs, int(memory * STATES_SHARE) // own.per_slot)


def _describe(
    config: EngineConfig,
    opened: OpenedModel,
    can: Capabilities,
    shift_obstacle: str,
    pool_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
) -> EngineInfo:
    """What clients and operators are told of the model."""
    model_config = opened.config
    return EngineInfo(
        model=config.model,
        max_model_len=can.max_model_len,
        vocab_size=can.vocab_size,
        num_blocks=can.num_blocks,
        block_size=can.block_size,
        pool_bytes=pool_bytes,
        kv_cache_dtype=_name(opened.kv_dtype),
        device=str(device),
        attention_backend=opened.backend.name,
        products=opened.mode if can.is_native and opened.mode not in PLAIN_MODES.values() else _name(dtype),
        weights_bytes=opened.packed.nbytes,
        instruction_set=instruction_set() if can.is_native else "",
        eos_token_ids=sorted(can.eos_token_ids),
        embedding_size=model_config.embeddings.size or model_config.text.hidden_size,
        embedding_layers=model_config.embeddings.layers,
        pooling=model_config.embeddings.pooling,
        has_head=model_config.has_head,
        context_shift=config.context_shift,
        shifted_len=can.shifted_len or 0,
        shift_obstacle=shift_obstacle,
        sampling_defaults=model_config.sampling_defaults if config.generation_config == "auto" else {},
    )


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
