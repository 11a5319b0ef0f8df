"""What a step that failed is run again as: smaller steps, so that one request does not take the others with it."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from scheduler.core.step import ChunkInput, ChunkResult, Executor, SeatChanges, StepInput

OUT_OF_MEMORY = "can't allocate memory"
"""What torch's allocator for the CPU says."""

DEVICE_ERRORS = ("CUDA error", "HIP error", "XPU error")
"""After one of these nothing works on the device any more, until the process ends."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether less at once might do."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error)


def is_device_lost(error: Exception) -> bool:
    """Whether trying again is of no use in this process."""
    return (
        isinstance(error, RuntimeError)
        and not is_out_of_memory(error)
        and any(words in str(error) for words in DEVICE_ERRORS)
    )


def run_in_parts(executor: Executor[Any], step: StepInput) -> list[ChunkResult | Exception]:
    """Each chunk alone: what came of it, or what it fails with. One for which there is not enough memory is
    computed in halves, and each of these in halves again. Raises the error that loses the device."""
    return [_run(executor, step, chunk) for chunk in step.chunks]


def _run(executor: Executor[Any], step: StepInput, chunk: ChunkInput) -> ChunkResult | Exception:
    try:
        # What became of states was done when the step was first launched, and cannot be done twice.
        changes = SeatChanges(step.changes.tables, step.changes.shifts)
        (result,) = executor.collect(executor.launch(StepInput([chunk], changes)))
        return result
    except Exception as error:
        if is_device_lost(error):
            raise
        half = min(len(chunk.token_ids) // 2, len(chunk.token_ids) - chunk.num_sampled)
        if not is_out_of_memory(error) or half < 1:
            return error
    parts: list[ChunkResult] = []
    for part in _split(chunk, half):
        found = _run(executor, step, part)
        if isinstance(found, Exception):
            return found
        parts.append(found)
    return _joined(*parts)


def _split(chunk: ChunkInput, length: int) -> tuple[ChunkInput, ChunkInput]:
    """The same in two chunks, to be computed one after the other: `length` tokens, and the rest. The rest has
    the rows of which tokens are sampled."""
    middle = chunk.start + length
    num_scored = min(len(chunk.targets), max(0, middle - chunk.first_scored))
    rest = len(chunk.token_ids) - length
    replace = msgspec.structs.replace
    first = replace(
        chunk,
        token_ids=chunk.token_ids[:length],
        num_drafted=0,
        samples=False,
        targets=chunk.targets[:num_scored],
        num_pooled=max(0, chunk.num_pooled - rest),
    )
    second = replace(
        chunk,
        start=middle,
        token_ids=chunk.token_ids[length:],
        before=None,
        first_scored=chunk.first_scored + num_scored,
        targets=chunk.targets[num_scored:],
        num_pooled=min(chunk.num_pooled, rest),
    )
    return first, second


def _joined(first: ChunkResult, rest: ChunkResult) -> ChunkResult:
    """That of a chunk of which this is the first part's and `rest` the other's."""
    sums = [part.pooled for part in (first, rest) if part.pooled]
    return ChunkResult(
        rest.tokens,
        first.is_broken or rest.is_broken,
        first.scored + rest.scored,
        [sum(numbers) for numbers in zip(*sums, strict=True)],
        rest.forced,
    )
