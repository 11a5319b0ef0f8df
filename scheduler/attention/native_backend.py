"""Paged attention for CPU: the native kernel, which reads the blocks in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scheduler.core.attention import LayerCache, LayerSpec, PackedBatch
from scheduler.kernels.native import kernels

VECTOR = 16
"""Head sizes and block sizes must be multiples of this many numbers: the kernel's vectors."""


class NativeAttention:
    """Attention in C++ (kernels/attention.cpp), parallel over sequences, heads and the context.

    Keys are laid out [num_blocks, num_kv_heads, key_dim, block_size], so that one vector holds the scores of 16
    tokens; values [num_blocks, num_kv_heads, block_size, value_dim]. A sequence's result has the same bits
    whatever the batch, the chunking or the block ids.
    """

    name = "native"

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._kernels = kernels()

    @staticmethod
    def obstacle(
        specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why the kernel cannot serve these layers, or None if it can."""
        if device.type != "cpu":
            return f"the kernel is for CPU, the model is on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the kernel reads float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if block_size % VECTOR != 0:
            return f"--block-size must be a multiple of {VECTOR} for the kernel, not {block_size}"
        if any(spec.key_dim % VECTOR != 0 or spec.value_dim % VECTOR != 0 for spec in specs):
            return f"the kernel wants keys and values of a multiple of {VECTOR} numbers"
        return None

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = spec.num_kv_heads
        return (
            torch.empty(num_blocks, heads, spec.key_dim, block_size, dtype=dtype, device=device),
            torch.empty(num_blocks, heads, block_size, spec.stored_value_dim, dtype=dtype, device=device),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        batch: PackedBatch,
        spec: LayerSpec,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys, values, group = cache
        latent_dim = spec.value_dim if spec.values_are_keys else 0
        stored = value[..., : spec.stored_value_dim].contiguous()
        self._kernels.write_kv(key.contiguous(), stored, batch.slot_mapping[group], keys, values, latent_dim)
        output: torch.Tensor = self._kernels.paged_attention(
            query.contiguous(),
            keys,
            values,
            batch.block_tables[group],
            batch.query_start,
            batch.context_lens,
            spec.scaling,
            spec.sliding_window or 0,
            spec.softcap or 0.0,
            self._num_threads,
            sinks=None if sinks is None else sinks.float(),
            slopes=slopes,
            chunk=spec.chunk or 0,
            latent_dim=latent_dim,
        )
        return output
