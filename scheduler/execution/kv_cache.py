"""The KV tensors behind the block ids, and how many blocks the memory holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil
import torch

from scheduler import container
from scheduler.attention import AttentionBackend, LayerSpec
from scheduler.config import EngineConfig

SHARE_OF_FREE_MEMORY = {"cpu": 0.4, "cuda": 0.85}

FEWEST_TOKENS = 256
"""A pool that holds fewer, where the model's sequences may be longer, serves nobody: it is refused."""


class KVCacheTooSmallError(ValueError):
    """The memory for the KV pool cannot hold what was asked of it; the message says what to change."""


class KVCache:
    """One key and one value tensor for each attention layer, in the layout of the attention backend."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        backend: AttentionBackend,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.specs = list(specs)
        self.backend = backend
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [backend.allocate(spec, num_blocks, block_size, dtype, device) for spec in specs]


def choose_kv_dtype(name: str, products: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The type of keys and values. `products` is float32 or bfloat16, or None for products in fewer bits; `dtype`
    is that of what is not products. auto is float32 only beside products of float32: in bfloat16 the cache takes
    half the memory and half the time to read, and loses less than those products do."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if dtype == torch.float16 or products == torch.float32:
        return dtype
    return torch.bfloat16


def bytes_per_block(specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values in one block, over all layers."""
    numbers = sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in specs) * block_size
    return numbers * dtype.itemsize


def choose_num_blocks(
    config: EngineConfig,
    specs: Sequence[LayerSpec],
    *,
    model_max_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """How many blocks the pool has: as many as `kv_cache_memory` holds, or by default a share of the free
    memory, up to what all seats could fill with sequences of the longest length.

    Raises `KVCacheTooSmallError` if that is not even one sequence of `max_model_len`, or of `FEWEST_TOKENS` where
    that was not given.
    """
    block_bytes = bytes_per_block(specs, config.block_size, dtype)
    longest = min(config.max_model_len or model_max_len, model_max_len)
    blocks_of_longest = math.ceil(longest / config.block_size)
    if config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // block_bytes
    else:
        memory = int(free_memory(device) * SHARE_OF_FREE_MEMORY[device.type])
        num_blocks = min(memory // block_bytes, config.max_num_seqs * blocks_of_longest)
    shortest = longest if config.max_model_len is not None else min(longest, FEWEST_TOKENS)
    required = math.ceil(shortest / config.block_size)
    if num_blocks < required:
        raise KVCacheTooSmallError(
            f"the KV pool would have {num_blocks} blocks of {config.block_size} tokens "
            f"({block_bytes / 2**20:.1f} MiB each), but {required} are needed for one sequence of "
            f"{required * config.block_size} tokens: raise --kv-cache-memory to at least "
            f"{math.ceil(required * block_bytes / 2**20)}MiB, or lower --max-model-len"
        )
    return num_blocks


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now without swapping; inside a container, within its limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    within = container.free_memory()
    return available if within is None else min(available, within)
