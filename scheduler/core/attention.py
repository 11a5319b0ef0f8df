"""What a step gives to attention, what a backend must do with it, and the reference in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer computes, as seen when the model was loaded."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    """Size of one head's query and key."""
    value_dim: int
    """Size of one head's value."""
    scaling: float
    sliding_window: int | None
    """Key j is visible to query i if i - sliding_window < j <= i; None: all j <= i are."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap); None: they stay."""
    chunk: int | None = None
    """Key j is visible to query i if also j // chunk == i // chunk; None: whatever their chunks are."""
    has_sinks: bool = False
    """Whether each head has one score more, which takes part in the softmax and has no value."""
    has_slopes: bool = False
    """Whether each head's scores fall with each token that lies between key and query."""
    values_are_keys: bool = False
    """Whether the values are the first `value_dim` numbers of the keys, and are not stored beside them."""

    @property
    def stored_value_dim(self) -> int:
        return 0 if self.values_are_keys else self.value_dim

    def oldest_visible(self, position: int) -> int:
        """The first place that the query at `position` sees."""
        of_window = 0 if self.sliding_window is None else position - self.sliding_window + 1
        of_chunk = 0 if self.chunk is None else position // self.chunk * self.chunk
        return max(0, of_window, of_chunk)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's tokens, those of all sequences one after the other, without padding.

    T tokens of S sequences; sequence i has the rows `[query_start[i], query_start[i + 1])` and a context of
    `context_lens[i]` tokens, of which its rows are the last. All tensors are on the model's device, but
    `query_lens` and `contexts`, plain lists of the same numbers, spare a device synchronisation.

    Each of G groups of layers has block tables of its own; most models have one group.
    """

    input_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64: each token's position, for rotary embeddings: its place in the context, and as many more as were
    dropped from the middle of that."""
    slot_mapping: torch.Tensor
    """[G, T] int64: where each token's KV goes, block id * block_size + place in the block."""
    query_start: torch.Tensor
    """[S + 1] int32."""
    context_lens: torch.Tensor
    """[S] int32."""
    block_tables: torch.Tensor
    """[G, S, longest table] int32; entries beyond a sequence's context, and those that none of its queries sees
    because of the group's window, are unspecified."""
    sample_rows: torch.Tensor
    """[number of sampled sequences] int64: the rows whose logits are wanted."""
    read_rows: torch.Tensor
    """[number of rows read for embeddings] int64: the rows whose last hidden states are wanted."""
    query_lens: list[int]
    contexts: list[int]
    seats: list[int] = field(default_factory=list)
    """Of the sequences, for models that keep something for each; may be left out for others."""
    long_rows: torch.Tensor | None = None
    """[T] bool: which tokens have the positions of a long text; None: none."""


class LayerCache(NamedTuple):
    """Where one attention layer keeps its keys and values."""

    keys: torch.Tensor
    values: torch.Tensor
    group: int = 0
    """Whose block tables name its blocks."""


class AttentionBackend(Protocol):
    """Paged attention. The backend also owns the layout of the KV tensors."""

    name: str

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one layer's key and value tensors for `num_blocks` blocks, uninitialised: the pool may be most of
        the memory, and a block's pages are to be touched only when it is first written."""

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
        """Write the new keys and values into their slots, then attend causally over each sequence's blocks.

        `query` is [T, num_heads, key_dim], `key` [T, num_kv_heads, key_dim], `value` [T, num_kv_heads,
        value_dim]; the result is [T, num_heads, value_dim] in the query's dtype. `sinks` and `slopes`,
        [num_heads] each, are those of a layer that has them.
        """


class TorchAttention:
    """Gathers each sequence's blocks and computes attention as the textbook has it, one sequence at a time. The
    oracle of the faster backends.

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
