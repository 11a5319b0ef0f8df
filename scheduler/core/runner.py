"""Turns a step's input into tensors, runs the forward pass, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from scheduler.core.attention import PackedBatch
from scheduler.core.drawing import SamplingRow, sample
from scheduler.core.model import StepModel, StepOutput
from scheduler.core.step import ChunkInput, ChunkResult, SampledToken, StepInput, StepResult, TableChange

Sample = Callable[[torch.Tensor, Sequence[SamplingRow]], list[SampledToken | None]]
"""Chooses a token for each row of logits: `drawing.sample` and what stands for it."""


class BlockTables:
    """A block table for each seat and group of layers, so that a step brings only what is new. What has fallen out
    of a group's window keeps its entry, which nobody reads."""

    def __init__(
        self, num_groups: int, num_seats: int, *, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        width = -(-max_model_len // block_size)
        self._tables = np.zeros((num_groups, num_seats, width), dtype=np.int32)

    def take(self, changes: Sequence[TableChange]) -> None:
        """What is new since the last step."""
        for change in changes:
            table = self._tables[change.group, change.seat]
            table[change.start : change.start + len(change.blocks)] = change.blocks

    def pack(self, chunks: Sequence[ChunkInput]) -> PackedBatch:
        """All chunks as one batch. Python work is per sequence; what is per token is vectorised."""
        seats = np.array([chunk.seat for chunk in chunks])
        shifts = np.array([chunk.shift for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks]) - shifts
        lengths = np.array([len(chunk.token_ids) for chunk in chunks])
        contexts = starts + lengths
        query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])

        token_ids: list[int] = []
        sample_rows: list[int] = []
        read_rows: list[int] = []
        for chunk in chunks:
            token_ids += chunk.token_ids
            first_scored = len(token_ids) - len(chunk.token_ids) + chunk.first_scored - chunk.start
            sample_rows += range(first_scored, first_scored + len(chunk.targets))
            sample_rows += range(len(token_ids) - chunk.num_sampled, len(token_ids))
            read_rows += range(len(token_ids) - chunk.num_pooled, len(token_ids))
        are_long = np.array([chunk.is_long for chunk in chunks])
        places = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], lengths)
        size = self._block_size
        blocks = self._tables[:, np.repeat(seats, lengths), places // size].astype(np.int64)
        return PackedBatch(
            input_ids=self.tensor(np.array(token_ids, dtype=np.int64)),
            positions=self.tensor(places + np.repeat(shifts, lengths)),
            slot_mapping=self.tensor(blocks * size + places % size),
            query_start=self.tensor(query_start),
            context_lens=self.tensor(contexts.astype(np.int32)),
            block_tables=self.tensor(self._tables[:, seats, : -(-int(contexts.max()) // size)]),
            sample_rows=self.tensor(np.array(sample_rows, dtype=np.int64)),
            read_rows=self.tensor(np.array(read_rows, dtype=np.int64)),
            query_lens=lengths.tolist(),
            contexts=contexts.tolist(),
            seats=seats.tolist(),
            long_rows=self.tensor(np.repeat(are_long, lengths)) if are_long.any() else None,
        )

    def tensor(self, array: npt.NDArray[np.integer | np.bool_]) -> torch.Tensor:
        """On the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


class Runner:
    """The plainest `Executor`: one forward pass over all chunks, and a token for each row that asks for one."""

    def __init__(self, model: StepModel, tables: BlockTables, sample: Sample = sample) -> None:
        self._model = model
        self._tables = tables
        self._sample = sample

    def launch(self, step: StepInput) -> tuple[StepInput, StepOutput]:
        """Run the forward pass, or on a GPU begin it."""
        self._tables.take(step.changes.tables)
        return step, self._model.forward(self._tables.pack(step.chunks))

    def collect(self, handle: tuple[StepInput, StepOutput]) -> StepResult:
        """Sample every wanted row with its own number, and keep guessed tokens for as long as they are those."""
        step, output = handle
        rows = [row for chunk in step.chunks for row in sampling_rows(chunk)]
        sampled = iter(self._sample(output.logits, rows) if rows else [])
        results: StepResult = []
        for chunk in step.chunks:
            kept = kept_tokens(chunk, [next(sampled) for _ in range(chunk.num_sampled)])
            results.append(ChunkResult(kept or [], is_broken=kept is None))
        return results


def sampling_rows(chunk: ChunkInput) -> list[SamplingRow]:
    """How each wanted row of a chunk is sampled: the number that decides depends on the token's place alone."""
    end = chunk.start + len(chunk.token_ids)
    return [
        SamplingRow(chunk.params, chunk.index, position)
        for position in range(end - chunk.num_sampled + 1, end + 1)
    ]


def kept_tokens(chunk: ChunkInput, sampled: list[SampledToken | None]) -> list[SampledToken] | None:
    """The sampled tokens that count: up to the first that is not the guessed one. None if that was no number."""
    drafted = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafted :]
    kept: list[SampledToken] = []
    for place, token in enumerate(sampled):
        if token is None:
            return None
        kept.append(token)
        if place < len(drafted) and token.token_id != drafted[place]:
            break
    return kept
