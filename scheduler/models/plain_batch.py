"""A packed batch without an engine: of sequences whose blocks lie in the pool in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from scheduler.attention import PackedBatch


def plain_batch(
    parts: Mapping[int, Sequence[int]],
    start: int,
    *,
    width: int,
    block_size: int,
    device: torch.device | None = None,
) -> PackedBatch:
    """The tokens of each sequence, by its number, that follow `start` others. Sequence i has `width` blocks, the
    first of which is i * `width`. The logits of all tokens are wanted."""
    lengths = [len(ids) for ids in parts.values()]
    positions = torch.cat([torch.arange(start, start + length) for length in lengths])
    numbers = torch.repeat_interleave(torch.tensor(list(parts)), torch.tensor(lengths))
    tables = [list(range(number * width, (number + 1) * width)) for number in parts]
    return PackedBatch(
        input_ids=torch.tensor([token for ids in parts.values() for token in ids], device=device),
        positions=positions.to(device),
        slot_mapping=(numbers * width * block_size + positions).unsqueeze(0).to(device),
        query_start=torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        context_lens=torch.tensor([start + length for length in lengths], dtype=torch.int32, device=device),
        block_tables=torch.tensor([tables], dtype=torch.int32, device=device),
        sample_rows=torch.arange(len(positions), device=device),
        read_rows=torch.empty(0, dtype=torch.int64, device=device),
        query_lens=lengths,
        contexts=[start + length for length in lengths],
        seats=list(parts),
    )
