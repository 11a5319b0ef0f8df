"""Packed batches without an engine: of sequences whose blocks lie in the pool in their order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from scheduler.attention import AttentionBackend, PackedBatch
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepModel
from scheduler.execution.step_model import StatefulModel

BLOCK_SIZE = 16


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


@torch.inference_mode()
def run_packed(
    model: StepModel,
    backend: AttentionBackend,
    sequences: Sequence[Sequence[int]],
    cuts: Sequence[int] = (),
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> list[torch.Tensor]:
    """The logits of each sequence's tokens, [T, vocabulary] float32: all together, in chunks that end at `cuts`,
    with keys and values of `dtype`."""
    longest = max(map(len, sequences))
    width = -(-longest // BLOCK_SIZE)
    cache = KVCache(
        model.layers,
        backend,
        num_blocks=len(sequences) * width,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=device or torch.device("cpu"),
    )
    model.bind(cache, longest)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for begin, end in chunks(cuts, longest):
        parts = {number: ids[begin:end] for number, ids in enumerate(sequences) if ids[begin:end]}
        batch = plain_batch(parts, begin, width=width, block_size=BLOCK_SIZE, device=device)
        found = model.forward(batch).logits.float()
        for number, own in zip(parts, torch.split(found, batch.query_lens), strict=True):
            logits[number].append(own)
    if isinstance(model, StatefulModel):
        for number in range(len(sequences)):
            model.vacate(number)
    return [torch.cat(each) for each in logits]


def chunks(cuts: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Where each begins and ends."""
    return itertools.pairwise([0, *cuts, length])
