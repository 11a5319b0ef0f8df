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
            torch.empty(*shape, spec.stored_value_dim, dtype=dtype, device=device),
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
        keys.flatten(0, 1)[batch.slot_mapping[group]] = key.to(keys.dtype)
        if spec.values_are_keys:
            values = keys[..., : spec.value_dim]
        else:
            values.flatten(0, 1)[batch.slot_mapping[group]] = value.to(values.dtype)
        block_size = keys.shape[1]
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        row = 0
        for index, (num_queries, context) in enumerate(zip(batch.query_lens, batch.contexts, strict=True)):
            # The first key that any of the queries can see, rounded down to a block.
            first = spec.oldest_visible(context - num_queries) // block_size * block_size
            table = batch.block_tables[group, index, first // block_size : -(-context // block_size)]
            output[row : row + num_queries] = attend_sequence(
                query[row : row + num_queries],
                keys[table].flatten(0, 1)[: context - first].to(query.dtype),
                values[table].flatten(0, 1)[: context - first].to(query.dtype),
                spec,
                sinks,
                slopes,
                first,
            )
            row += num_queries
        return output


def attend_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: LayerSpec,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Causal attention of one sequence's last N tokens over its last C, before which there are `first` more that
    none of them sees: `query` is [N, num_heads, key_dim], `key` and `value` [C, num_kv_heads, ...]; returns
    [N, num_heads, value_dim]."""
    num_queries, context = query.shape[0], key.shape[0]
    # Query heads that share a KV head become rows of one product: [num_kv_heads, group, N, key_dim].
    grouped = query.view(num_queries, spec.num_kv_heads, -1, spec.key_dim).permute(1, 2, 0, 3)
    scores = grouped @ key.permute(1, 2, 0).unsqueeze(1) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    # How many tokens each key lies behind each query.
    last = torch.arange(context - num_queries, context, device=query.device)
    distance = last[:, None] - torch.arange(context, device=query.device)[None, :]
    if slopes is not None:
        scores = scores - slopes.view(spec.num_kv_heads, -1, 1, 1).to(scores) * distance
    hidden = distance < 0
    if spec.sliding_window is not None:
        hidden |= distance >= spec.sliding_window
    if spec.chunk is not None:
        chunks = torch.arange(first, first + context, device=query.device) // spec.chunk
        hidden |= chunks[-num_queries:, None] != chunks[None, :]
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(spec.num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :context].to(query.dtype)
    return (weights @ value.transpose(0, 1).unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2).contiguous()
