"""Runs steps with all that a request may ask for: steering, logprobs, embeddings, states, context shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepModel, StepOutput
from scheduler.core.runner import BlockTables, kept_tokens, sampling_rows
from scheduler.core.step import ChunkInput, ChunkResult, SampledToken, StepInput, StepResult, TokenLogprobs
from scheduler.execution.logits import LogitScans, NativeScans, TorchScans
from scheduler.execution.sampler import logprobs, sample
from scheduler.execution.steering import SteeredStep, Steerings
from scheduler.execution.step_model import ResumableModel, ShiftableModel, StatefulModel

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
    """The `Executor` that runs a model here."""

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
        self._scans: LogitScans = (
            NativeScans(torch.get_num_threads()) if cache.backend.name == "native" else TorchScans()
        )
        self._tables = BlockTables(
            len(cache.groups),
            num_seats,
            max_model_len=max_model_len,
            block_size=cache.block_size,
            device=device,
        )

    def launch(self, step: StepInput) -> Launched:
        """Run the forward pass, or on a GPU begin it."""
        changes = step.changes
        self._tables.take(changes.tables)
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
            self.model.shift_sink(shift)
        # Masks are filled while the forward pass runs: neither needs the other, nor the interpreter for long.
        steered = self._beside.submit(self.steerings.steer, step.chunks) if self.steerings.has_work(step) else None
        try:
            output = self.model.forward(self._tables.pack(step.chunks))
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
        rows = [row for chunk in chunks for row in sampling_rows(chunk)]
        sampled = iter(sample(logits, rows, self._scans, handle.steered) if rows else [])
        results: StepResult = []
        for place, chunk in enumerate(chunks):
            kept = kept_tokens(chunk, [next(sampled) for _ in range(chunk.num_sampled)])
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
                targets = self._tables.tensor(np.array(chunk.targets, dtype=np.int64))
                counts = [chunk.params.prompt_logprobs or 0] * len(targets)
                scored[place] = logprobs(logits[first:end], targets, counts, self._scans, ranked=True)
            first = end + chunk.num_sampled
            sampled.append(logits[end:first])
        return torch.cat(sampled), scored


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
