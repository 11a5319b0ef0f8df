"""Turns a plan into tensors, runs the forward pass, and samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from scheduler.attention import PackedBatch
from scheduler.kv_cache import KVCache
from scheduler.logits import LogitScans, NativeScans, TorchScans
from scheduler.plan import Chunk, Plan
from scheduler.quantization import StepModel
from scheduler.request import Sequence
from scheduler.sampler import SampledToken, SamplingRow, sample


class Runner:
    """Executes plans. Keeps one row of block ids for each seat, so that a step adds only what is new."""

    def __init__(
        self, model: StepModel, cache: KVCache, *, device: torch.device, num_seats: int, max_model_len: int
    ) -> None:
        self.model = model
        self.cache = cache
        self._device = device
        self._scans: LogitScans = (
            NativeScans(torch.get_num_threads()) if cache.backend.name == "native" else TorchScans()
        )
        self._tables = np.zeros((num_seats, -(-max_model_len // cache.block_size)), dtype=np.int32)
        # Whose table each row holds (a preempted sequence comes back with another), and how much of it.
        self._owners: list[list[int] | None] = [None] * num_seats
        self._filled = [0] * num_seats

    def forward(self, plan: Plan) -> torch.Tensor:
        """Run one forward pass over the plan's chunks; returns a row of logits for each of `plan.sampling`."""
        return self.model.forward(self.pack(plan.chunks), self.cache)

    def sample(self, plan: Plan, logits: torch.Tensor) -> list[SampledToken]:
        """Sample a token for each of `plan.sampling`."""
        rows = [
            SamplingRow(sequence.request.params, sequence.index, sequence.num_tokens) for sequence in plan.sampling
        ]
        return sample(logits, rows, self._scans) if rows else []

    def pack(self, chunks: list[Chunk]) -> PackedBatch:
        """Build the packed batch. Python work is per sequence; what is per token is vectorised."""
        block_size = self.cache.block_size
        seats = np.array([self._seat(chunk.sequence) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        lengths = np.array([chunk.length for chunk in chunks])
        contexts = starts + lengths
        query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])

        token_ids: list[int] = []
        for chunk in chunks:
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], lengths)
        blocks = self._tables[np.repeat(seats, lengths), positions // block_size].astype(np.int64)
        width = -(-int(contexts.max()) // block_size)
        sample_rows = [int(query_start[i + 1]) - 1 for i, chunk in enumerate(chunks) if chunk.samples]
        return PackedBatch(
            input_ids=self._tensor(np.array(token_ids, dtype=np.int64)),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(blocks * block_size + positions % block_size),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(contexts.astype(np.int32)),
            block_tables=self._tensor(self._tables[seats, :width]),
            sample_rows=self._tensor(np.array(sample_rows, dtype=np.int64)),
            query_lens=lengths.tolist(),
            contexts=contexts.tolist(),
        )

    def _seat(self, sequence: Sequence) -> int:
        """The sequence's row of the tables, brought up to date with its block table."""
        seat = sequence.seat
        assert seat is not None
        table = sequence.block_table
        if self._owners[seat] is not table:
            self._owners[seat] = table
            self._filled[seat] = 0
        filled = self._filled[seat]
        if filled < len(table):
            self._tables[seat, filled : len(table)] = table[filled:]
            self._filled[seat] = len(table)
        return seat

    def _tensor(self, array: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
