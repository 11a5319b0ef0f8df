"""Paged attention for GPUs: torch's FlexAttention, compiled into one kernel that reads the blocks in place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scheduler.core.attention import LayerCache, LayerSpec, PackedBatch

TILE = 64
"""Queries of one sequence that share a pass over its blocks, in a step that is not decoding alone."""

QUERY_BLOCK = 128
"""FlexAttention's block of queries: a tile is within one."""

MAX_KERNELS = 64
"""One for each kind of layer and height of tile, and more for sizes of one: torch's own limit is 8."""


class FlexAttention:
    """Cuts the batch into tiles of consecutive queries of one sequence; each visits its sequence's blocks.

    A step that is decoding alone has tiles of one query. They are made of the batch's tensors and nothing on the
    host, so that such a step can be captured as a CUDA graph. Keys and values are laid out
    [num_blocks, block_size, num_kv_heads, head size].
    """

    name = "flex"

    def __init__(self, device: torch.device) -> None:
        # Elsewhere it is for checking, and runs as torch operators over the whole pool.
        self._kernel: Callable[..., Tensor] = attend_tiles
        if device.type == "cuda":
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_KERNELS)
            # With fullgraph it is an error, and not just slow, if a kernel cannot be made.
            self._kernel = torch.compile(attend_tiles, dynamic=False, fullgraph=True)
        self._batch: PackedBatch | None = None
        self._tiles: Tiles | None = None
        self._visits: dict[tuple[int, int | None], Visits] = {}

    @staticmethod
    def obstacle(specs: Sequence[LayerSpec], block_size: int, device: torch.device) -> str | None:
        """Why FlexAttention cannot serve these layers, or None if it can."""
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "FlexAttention is compiled by triton, which is not installed"
        if block_size < 16 or block_size & (block_size - 1) != 0:
            return f"--block-size must be a power of two and at least 16 for FlexAttention, not {block_size}"
        if any(min(spec.key_dim, spec.value_dim) < 16 for spec in specs):
            return "FlexAttention wants keys and values of at least 16 numbers"
        if any(
            spec.chunk is not None or spec.has_sinks or spec.has_slopes or spec.values_are_keys for spec in specs
        ):
            return "attention in chunks, with sinks or slopes, or to latents is not written for FlexAttention"
        return None

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        shape = (num_blocks, block_size, spec.num_kv_heads)
        # Zeros, because a value that is masked out is still multiplied by zero, and must be finite.
        return (
            torch.zeros(*shape, spec.key_dim, dtype=dtype, device=device),
            torch.zeros(*shape, spec.value_dim, dtype=dtype, device=device),
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerCache,
        batch: PackedBatch,
        spec: LayerSpec,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        keys, values, group = cache
        key, value = key.to(keys.dtype), value.to(values.dtype)
        # So a value that is not finite is told by its key alone, which a mask hides from whoever must not see it.
        is_sound = value.isfinite().all(dim=-1, keepdim=True)
        slots = batch.slot_mapping[group]
        keys.flatten(0, 1)[slots] = key.where(is_sound, torch.nan)
        values.flatten(0, 1)[slots] = value.where(is_sound, 0.0)
        if self._tiles is None or batch is not self._batch:
            self._batch, self._tiles, self._visits = batch, Tiles.of(batch), {}
        tiles, window = self._tiles, spec.sliding_window
        if (group, window) not in self._visits:
            self._visits[group, window] = Visits.of(batch, tiles, keys.shape[0], keys.shape[1], group, window)
        visits = self._visits[group, window]
        queries = query[tiles.rows].transpose(1, 2).to(keys.dtype)
        for tensor in (queries, tiles.sequences, tiles.positions, *visits):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.maybe_mark_dynamic(visits.blocks, 3)
        output = self._kernel(
            queries,
            keys,
            values,
            tiles.sequences,
            tiles.positions,
            *visits,
            scale=spec.scaling,
            window=window,
            softcap=spec.softcap,
        )
        return output.transpose(1, 2).flatten(0, 1)[tiles.order].to(query.dtype)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a batch's rows lie in tiles of one height."""

    rows: Tensor
    """[tiles, height] int64: the batch's row at each place; a tile that is not full repeats its last."""
    order: Tensor
    """[T] int64: where each of the batch's rows is among those of all tiles."""
    sequences: Tensor
    """[tiles] int64: whose queries they are."""
    positions: Tensor
    """[tiles, height] int32: each query's place in its sequence."""

    @classmethod
    def of(cls, batch: PackedBatch) -> Tiles:
        device = batch.positions.device
        if max(batch.query_lens) == 1:
            order = sequences = torch.arange(len(batch.query_lens), device=device)
            rows = order.unsqueeze(1)
        else:
            lengths = np.array(batch.query_lens)
            ends = np.cumsum(lengths)
            tiles = -(-lengths // TILE)
            owners = np.repeat(np.arange(len(lengths)), tiles)
            within = np.arange(len(owners)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
            starts = (ends - lengths)[owners] + within * TILE
            laid = np.minimum(starts[:, None] + np.arange(TILE), ends[owners, None] - 1)
            # Of the places that show a row, the first is its own: the others repeat it to fill the tile.
            _, first = np.unique(laid, return_index=True)
            rows, order, sequences = (
                torch.from_numpy(array).to(device, non_blocking=True) for array in (laid, first, owners)
            )
        return cls(rows, order, sequences, batch.positions[rows].int())


class Visits(NamedTuple):
    """Where in the pool a group of layers finds what the tiles see through one window."""

    places: Tensor
    """[S, num_blocks + 1] int32: which of the sequence's blocks a block of the pool is, -1 if none; the last
    column takes what the block tables hold beyond a context, and what is out of sight."""
    counts: Tensor
    """[tiles, 1, 1] int32: how many blocks hold what each tile's queries see."""
    blocks: Tensor
    """[tiles, 1, 1, longest table] int32: which."""

    @classmethod
    def of(
        cls, batch: PackedBatch, tiles: Tiles, num_blocks: int, block_size: int, group: int, window: int | None
    ) -> Visits:
        tables = batch.block_tables[group]
        width = tables.shape[1]
        columns = torch.arange(width, dtype=torch.int32, device=tables.device)
        held = columns * block_size < batch.context_lens.unsqueeze(1)
        first = torch.zeros_like(tiles.positions[:, 0])
        if window is not None:
            queries = batch.query_start.diff()
            oldest = (batch.context_lens - queries - window + 1).clamp(min=0) // block_size
            held &= columns >= oldest.unsqueeze(1)
            first = (tiles.positions[:, 0] - window + 1).clamp(min=0) // block_size
        places = torch.full((len(tables), num_blocks + 1), -1, dtype=torch.int32, device=tables.device)
        places.scatter_(1, torch.where(held, tables, num_blocks).long(), columns.expand_as(tables))
        counts = tiles.positions[:, -1] // block_size + 1 - first
        seen = first.unsqueeze(1) + torch.arange(width, device=first.device)
        blocks = tables[tiles.sequences].gather(1, seen.clamp(max=width - 1))
        return cls(places, counts[:, None, None].int(), blocks[:, None, None].int())


def attend_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Tensor,
    positions: Tensor,
    places: Tensor,
    counts: Tensor,
    blocks: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of `query`, [tiles, num_heads, height, key_dim], over a layer's whole pool: which slots a query
    sees is the mask's to say, and which blocks are worth a visit is `counts` and `blocks`."""
    num_blocks, block_size, num_kv_heads = keys.shape[:3]
    num_heads, height = query.shape[1:3]

    def visible(tile: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        place = places[sequences[tile], slot // block_size]
        distance = positions[tile, row] - (place * block_size + slot % block_size)
        seen = (place >= 0) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def capped(score: Tensor, tile: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    mask = BlockMask.from_kv_blocks(
        counts,
        blocks,
        BLOCK_SIZE=(QUERY_BLOCK, block_size),
        mask_mod=visible,
        seq_lengths=(height, num_blocks * block_size),
        compute_q_blocks=False,
    )
    # The kernel for one query lays the heads that share a KV head side by side, as rows of one product.
    group = num_heads // num_kv_heads
    rows = TILE if height == TILE else max(16, 1 << (group - 1).bit_length())
    output: Tensor = flex_attention(
        query,
        keys.flatten(0, 1).transpose(0, 1).unsqueeze(0),
        values.flatten(0, 1).transpose(0, 1).unsqueeze(0),
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=group > 1,
        kernel_options={"BLOCK_M": rows, "BLOCK_N": min(block_size, 64)},
    )
    return output
