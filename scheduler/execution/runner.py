"""Turns a step's input into tensors, runs the forward pass, and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from scheduler.attention import PackedBatch
from scheduler.execution.kv_cache import KVCache
from scheduler.execution.logits import LogitScans, NativeScans, TorchScans
from scheduler.execution.sampler import SamplingRow, logprobs, sample
from scheduler.execution.steering import SteeredStep, Steerings
from scheduler.execution.step_model import ResumableModel, ShiftableModel, StatefulModel, StepModel, StepOutput
from scheduler.step import ChunkInput, ChunkResult, SampledToken, StepInput, StepResult, TokenLogprobs

_POOLING_STEPS = 2.0**24
"""In 1. Sums of such steps are exact in float64, in whatever order and parts, up to 2^29."""


class Launched(NamedTuple):
    """A step on its way."""

    step: StepInput
    output: StepOutput
    """Logits of each chunk's rows: those that its targets follow, then those of which tokens are sampled."""
    steered: SteeredStep | None
    """What is done to those of which tokens are sampled."""


class Runner:
    """The `Executor` that runs a model here. Keeps a block table for each seat and group of layers, so that a step
    brings only what is new. What has fallen out of a group's window keeps its entry, which nobody reads."""

    def __init__(
        self,
        model: StepModel,
        cache: KVCache,
        *,
        device: torch.device,
        num_seats: int,
        max_model_len: int,
        steerings: Steerings,
    ) -> None:
        self.model = model
        self.cache = cache
        self.steerings = steerings
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steering")
        self._device = device
        self._scans: LogitScans = (
            NativeScans(torch.get_num_threads()) if cache.backend.name == "native" else TorchScans()
        )
        width = -(-max_model_len // cache.block_size)
        self._tables = np.zeros((len(cache.groups), num_seats, width), dtype=np.int32)

    def launch(self, step: StepInput) -> Launched:
        """Run the forward pass, or on a GPU begin it."""
        changes = step.changes
        for change in changes.tables:
            table = self._tables[change.group, change.seat]
            table[change.start : change.start + len(change.blocks)] = change.blocks
        for move in changes.saves:
            assert isinstance(self.model, ResumableModel)
            self.model.save_state(move)
        if changes.vacated and isinstance(self.model, StatefulModel):
            for seat in changes.vacated:
                self.model.vacate(seat)
        for move in changes.loads:
            assert isinstance(self.model, ResumableModel)
            self.model.load_state(move)
        for shift in changes.shifts:
            assert isinstance(self.model, ShiftableModel)
            self.model.shift_sink(self.cache, shift)
        # Masks are filled while the forward pass runs: neither needs the other, nor the interpreter for long.
        steered = self._beside.submit(self.steerings.steer, step.chunks) if self.steerings.has_work(step) else None
        try:
            output = self.model.forward(self._pack(step.chunks), self.cache)
        finally:
            found = None if steered is None else steered.result()
        return Launched(step, output, found)

    def collect(self, handle: Launched) -> StepResult:
        """Sample every wanted row with its own number, and keep guessed tokens for as long as they are those."""
        chunks = handle.step.chunks
        logits = handle.output.logits
        scored: dict[int, list[TokenLogprobs]] = {}
        if any(chunk.targets for chunk in chunks):
            logits, scored = self._score(chunks, logits)
        pooled = _pooled(chunks, handle.output.states)
        rows = [row for chunk in chunks for row in _rows(chunk)]
        sampled = iter(sample(logits, rows, self._scans, handle.steered) if rows else [])
        results: StepResult = []
        for place, chunk in enumerate(chunks):
            kept = _kept(chunk, [next(sampled) for _ in range(chunk.num_sampled)])
            states = pooled.get(place, [])
            is_broken = kept is None or not all(map(math.isfinite, states))
            forced = self._forced(chunk, kept or [])
            results.append(ChunkResult(kept or [], is_broken, scored.get(place, []), states, forced))
        for chunk, result in zip(chunks, results, strict=True):  # nothing is changed before nothing can fail
            if chunk.num_drafted and chunk.params.is_steered and result.tokens:
                self.steerings.accept(chunk, result.token_ids[:-1])
        return results

    def _forced(self, chunk: ChunkInput, gained: list[SampledToken]) -> list[int]:
        """What a sequence's grammar forces behind what it gained."""
        if not (gained and chunk.params.is_steered):
            return []
        return self.steerings.forced(chunk, [token.token_id for token in gained])

    def _score(
        self, chunks: Sequence[ChunkInput], logits: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, list[TokenLogprobs]]]:
        """The rows of which tokens are sampled, and by chunk the log-probabilities of its targets."""
        scored: dict[int, list[TokenLogprobs]] = {}
        sampled: list[torch.Tensor] = []
        first = 0
        for place, chunk in enumerate(chunks):
            end = first + len(chunk.targets)
            if chunk.targets:
                targets = self._tensor(np.array(chunk.targets, dtype=np.int64))
                counts = [chunk.params.prompt_logprobs or 0] * len(targets)
                scored[place] = logprobs(logits[first:end], targets, counts, self._scans, ranked=True)
            first = end + chunk.num_sampled
            sampled.append(logits[end:first])
        return torch.cat(sampled), scored

    def _pack(self, chunks: list[ChunkInput]) -> PackedBatch:
        """Build the packed batch. Python work is per sequence; what is per token is vectorised."""
        block_size = self.cache.block_size
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
        blocks = self._tables[:, np.repeat(seats, lengths), places // block_size].astype(np.int64)
        width = -(-int(contexts.max()) // block_size)
        return PackedBatch(
            input_ids=self._tensor(np.array(token_ids, dtype=np.int64)),
            positions=self._tensor(places + np.repeat(shifts, lengths)),
            slot_mapping=self._tensor(blocks * block_size + places % block_size),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(contexts.astype(np.int32)),
            block_tables=self._tensor(self._tables[:, seats, :width]),
            sample_rows=self._tensor(np.array(sample_rows, dtype=np.int64)),
            read_rows=self._tensor(np.array(read_rows, dtype=np.int64)),
            query_lens=lengths.tolist(),
            contexts=contexts.tolist(),
            seats=seats.tolist(),
            long_rows=self._tensor(np.repeat(are_long, lengths)) if are_long.any() else None,
        )

    def _tensor(self, array: npt.NDArray[np.integer | np.bool_]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def _pooled(chunks: Sequence[ChunkInput], states: torch.Tensor) -> dict[int, list[float]]:
    """By chunk, the sum of its part of the `states`, whose rows are [rows read, hidden size]."""
    steps = (states.double() * _POOLING_STEPS).round()
    sums: dict[int, list[float]] = {}
    first = 0
    for place, chunk in enumerate(chunks):
        if chunk.num_pooled:
            end = first + chunk.num_pooled
            sums[place] = (steps[first:end].sum(dim=0) / _POOLING_STEPS).tolist()
            first = end
    return sums


def _rows(chunk: ChunkInput) -> list[SamplingRow]:
    """How each wanted row of a chunk is sampled: the number that decides depends on the token's place alone."""
    end = chunk.start + len(chunk.token_ids)
    return [
        SamplingRow(chunk.params, chunk.index, position)
        for position in range(end - chunk.num_sampled + 1, end + 1)
    ]


def _kept(chunk: ChunkInput, sampled: list[SampledToken | None]) -> list[SampledToken] | None:
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
