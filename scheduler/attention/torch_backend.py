"""Paged attention in plain torch: works on every device, and is the oracle for the faster backends."""

from __future__ import annotations

import torch

from scheduler.attention.interface import LayerCache, LayerSpec, PackedBatch


class TorchAttention:
    """Gathers each sequence's blocks and computes attention as the textbook has it, one sequence at a time.

    Keys and values are laid out [num_blocks, block_size, num_kv_heads, head size].
    """

    name = "torch"

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_blocks, block_size, spec.num_kv_heads)
        return (
            torch.empty(*shape, spec.key_dim, dtype=dtype, device=device),
            torch.empty(*shape, spec.value_dim, dtype=dtype, device=device),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        batch: PackedBatch,
        spec: LayerSpec,
    ) -> torch.Tensor:
        keys, values, group = cache
        keys.flatten(0, 1)[batch.slot_mapping[group]] = key.to(keys.dtype)
        values.flatten(0, 1)[batch.slot_mapping[group]] = value.to(values.dtype)
        block_size = keys.shape[1]
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        row = 0
        for index, (num_queries, context) in enumerate(zip(batch.query_lens, batch.contexts, strict=True)):
            first = 0  # the first key that any of the queries can see, rounded down to a block
            if spec.sliding_window is not None:
                first = max(0, context - num_queries - spec.sliding_window + 1) // block_size * block_size
            table = batch.block_tables[group, index, first // block_size : -(-context // block_size)]
            output[row : row + num_queries] = attend_sequence(
                query[row : row + num_queries],
                keys[table].flatten(0, 1)[: context - first].to(query.dtype),
                values[table].flatten(0, 1)[: context - first].to(query.dtype),
                spec,
            )
            row += num_queries
        return output


def attend_sequence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """Causal attention of one sequence's last N tokens over its last C: `query` is [N, num_heads, key_dim],
    `key` and `value` [C, num_kv_heads, ...]; returns [N, num_heads, value_dim]."""
    num_queries, context = query.shape[0], key.shape[0]
    # Query heads that share a KV head become rows of one product: [num_kv_heads, group, N, key_dim].
    grouped = query.view(num_queries, spec.num_kv_heads, -1, spec.key_dim).permute(1, 2, 0, 3)
    scores = grouped @ key.permute(1, 2, 0).unsqueeze(1) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    # How many tokens each key lies behind each query.
    last = torch.arange(context - num_queries, context, device=query.device)
    distance = last[:, None] - torch.arange(context, device=query.device)[None, :]
    hidden = distance < 0
    if spec.sliding_window is not None:
        hidden |= distance >= spec.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value.transpose(0, 1).unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2)
