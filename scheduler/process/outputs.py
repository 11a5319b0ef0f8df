"""What the engine tells of a sequence."""

from __future__ import annotations

from scheduler.core.plan import Chunk, Gain
from scheduler.core.request import FinishReason, Request
from scheduler.core.sequence import Sequence
from scheduler.core.step import NOTHING
from scheduler.wire.messages import SeatView, SequenceOutput, StepPart


def refused(request: Request, reason: FinishReason, error: str | None) -> list[SequenceOutput]:
    """A request that was never queued."""
    return [
        SequenceOutput(request.request_id, index, finish_reason=reason, error=error)
        for index in range(request.params.n)
    ]


def is_news(gain: Gain) -> bool:
    """Whether there is anything to tell the client, or whoever counts what its prompt takes."""
    sequence = gain.sequence
    if sequence.finish_reason is not None or sequence.num_output_tokens == 0:
        return True
    return gain.result.tells_client or sequence.request.params.explain


def output_of(
    sequence: Sequence,
    gain: Gain | None = None,
    error: str | None = None,
    part: StepPart | None = None,
) -> SequenceOutput:
    return SequenceOutput(
        request_id=sequence.request.request_id,
        index=sequence.index,
        result=gain.result if gain else NOTHING,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        num_cached_tokens=sequence.num_cached_tokens,
        queue_time=(
            sequence.seated_time - sequence.request.arrival_time if sequence.seated_time is not None else 0.0
        ),
        error=error,
        drafted=list(gain.chunk.drafted) if gain else [],
        part=part,
        num_computed=sequence.num_ever_computed,
    )


def view_of(sequence: Sequence) -> SeatView:
    """A running sequence, for those who look on."""
    return SeatView(
        seat=sequence.held.seat,
        request_id=sequence.request.request_id,
        index=sequence.index,
        user=sequence.request.user,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_computed_tokens=sequence.num_computed_tokens,
        num_output_tokens=sequence.num_output_tokens,
        max_tokens=sequence.request.params.max_tokens or 0,
    )


def part_of(chunk: Chunk, num_sequences: int, seconds: float) -> StepPart | None:
    """What the step was for the chunk's sequence, if that is to be explained."""
    if not chunk.sequence.request.params.explain:
        return None
    return StepPart(chunk.start, chunk.length, chunk.shift, num_sequences, seconds)
