"""How many blocks the memory holds, and of which layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil
import torch

from scheduler.attention import LayerSpec
from scheduler.config import EngineConfig
from scheduler.core.kv_cache import LayerGroup, one_group
from scheduler.core.windows import Holdings
from scheduler.machine import container

SHARE_OF_FREE_MEMORY = {"cpu": 0.4, "cuda": 0.85}

FEWEST_TOKENS = 256
"""A pool that holds fewer, where the model's sequences may be longer, serves nobody: it is refused."""


MOST_GROUPS = 8
"""A step looks at a block table of every group for every sequence."""


TYPICAL_TOKENS = 4096
"""The length for which layers are grouped."""


class KVCacheTooSmallError(ValueError):
    """The memory for the KV pool cannot hold what was asked of it; the message says what to change."""


def group_layers(specs: Sequence[LayerSpec]) -> list[LayerGroup]:
    """The layers by their windows, the widest first, cut into groups of one size.

    A block has room for as many layers as the largest group has, so that any block can be any group's. Of the
    sizes that make no more than `MOST_GROUPS` groups it is the one with which a sequence of `TYPICAL_TOKENS` takes
    the least room. Layers whose keys and values differ in shape cannot take each other's blocks: then all are one
    group without a window.
    """
    if len({(spec.num_kv_heads, spec.key_dim, spec.value_dim, spec.values_are_keys) for spec in specs}) != 1:
        return [one_group(specs)]
    alike: dict[int | None, list[int]] = {}
    for layer, spec in enumerate(specs):
        alike.setdefault(spec.sliding_window, []).append(layer)

    def num_groups(size: int) -> int:
        return sum(-(-len(layers) // size) for layers in alike.values())

    def room(size: int) -> int:
        """In tokens' layers."""
        return sum(
            size * -(-len(layers) // size) * min(window or TYPICAL_TOKENS, TYPICAL_TOKENS)
            for window, layers in alike.items()
        )

    sizes = range(1, max(len(layers) for layers in alike.values()) + 1)
    few = [size for size in sizes if num_groups(size) <= max(MOST_GROUPS, len(alike))]
    size = min(few, key=lambda size: (room(size), -size))
    return [
        LayerGroup(window, layers[start : start + size])
        for window, layers in sorted(alike.items(), key=lambda item: -math.inf if item[0] is None else -item[0])
        for start in range(0, len(layers), size)
    ]


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
    """Bytes of keys and values in one block, over these layers."""
    numbers = sum(spec.num_kv_heads * (spec.key_dim + spec.stored_value_dim) for spec in specs) * block_size
    return numbers * dtype.itemsize


def holdings(config: EngineConfig, groups: Sequence[LayerGroup], device: torch.device) -> Holdings:
    """How many blocks sequences hold in these groups."""
    return Holdings([group.window for group in groups], config.block_size, config.step_tokens(device.type))


def choose_num_blocks(
    config: EngineConfig,
    groups: Sequence[LayerGroup],
    block_bytes: int,
    *,
    model_max_len: int,
    device: torch.device,
    seats_bytes: int = 0,
) -> int:
    """How many blocks of `block_bytes` the pool has: as many as `kv_cache_memory` holds, or by default a share of
    the free memory, up to what all seats could fill with sequences of the longest length. `seats_bytes` of it are
    for what the model keeps for each seat, however long its sequence is.

    Raises `KVCacheTooSmallError` if that is not even one sequence of `max_model_len`, or of `FEWEST_TOKENS` where
    that was not given.
    """
    held = holdings(config, groups, device)
    longest = min(config.max_model_len or model_max_len, model_max_len)
    num_blocks = max(0, pool_memory(config, device) - seats_bytes) // block_bytes
    if config.kv_cache_memory is None:
        num_blocks = min(num_blocks, config.max_num_seqs * held.blocks(longest))
    shortest = longest if config.max_model_len is not None else min(longest, FEWEST_TOKENS)
    required = held.blocks(shortest)
    in_blocks = math.ceil(shortest / config.block_size) * config.block_size
    if num_blocks < required:
        raise KVCacheTooSmallError(
            f"the KV pool would have {num_blocks} blocks of {config.block_size} tokens "
            f"({block_bytes / 2**20:.1f} MiB each), but {required} are needed for one sequence of "
            f"{in_blocks} tokens: raise --kv-cache-memory to at least "
            f"{math.ceil((seats_bytes + required * block_bytes) / 2**20)}MiB, or lower --max-model-len"
        )
    return num_blocks


def pool_memory(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the pool may have, and whatever else is kept of sequences."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    return int(free_memory(device) * SHARE_OF_FREE_MEMORY[device.type])


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now without swapping; inside a container, within its limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    within = container.free_memory()
    return available if within is None else min(available, within)
