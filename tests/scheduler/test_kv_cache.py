"""How many blocks the pool has, and when it is too small to be of use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scheduler.attention import LayerSpec
from scheduler.config import EngineConfig
from scheduler.models.memory import KVCacheTooSmallError, bytes_per_block, choose_num_blocks, group_layers

LAYERS = [LayerSpec(8, 8, 64, 64, 0.125, None, None)] * 32
"""1 MiB in a block of 16 tokens, in bfloat16."""


def num_blocks(memory: str, model_max_len: int = 8192, **knobs: Any) -> int:
    config = EngineConfig(kv_cache_memory=memory, **knobs)
    block_bytes = bytes_per_block(LAYERS, config.block_size, torch.bfloat16)
    groups = group_layers(LAYERS)
    return choose_num_blocks(config, groups, block_bytes, model_max_len=model_max_len, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("knobs", "fewest"),
    [
        ({}, 16),
        ({"model_max_len": 128}, 8),
        ({"max_model_len": 40}, 3),
        ({"max_model_len": 4096}, 256),
        ({"block_size": 32}, 8),
    ],
)
def test_a_pool_that_serves_nobody_is_refused(knobs: dict[str, int], fewest: int) -> None:
    size = knobs.get("block_size", 16) // 16
    assert num_blocks(f"{fewest * size}MiB", **knobs) == fewest
    with pytest.raises(
        KVCacheTooSmallError, match=f"raise --kv-cache-memory to at least {fewest * size}MiB, or lower --max-m"
    ):
        num_blocks(f"{fewest * size * 1024 - 1}KiB", **knobs)
