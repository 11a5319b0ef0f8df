"""What a step did for a sequence: what it gained, and what work that was."""

from __future__ import annotations

from typing import NamedTuple

from scheduler.planning.plan import Chunk
from scheduler.planning.policy import Work
from scheduler.planning.sequence import Sequence
from scheduler.step import ChunkResult


class Gain(NamedTuple):
    """What a step gave to one sequence."""

    chunk: Chunk
    """What was computed for it. Guesses, as far as they were right, are the first of the result's tokens."""
    result: ChunkResult
    """What came of that, up to the answer's end."""

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence

    @property
    def is_news(self) -> bool:
        """Whether there is anything to tell the client, or whoever counts what its prompt takes."""
        sequence = self.sequence
        if sequence.finish_reason is not None or sequence.num_output_tokens == 0:
            return True
        return self.result.tells_client or sequence.request.params.explain


def work_of(chunk: Chunk, num_sampled: int, num_refused: int) -> Work:
    """What a computed chunk did for its sequence, whose account takes it in: so many tokens were sampled, and so
    many guesses were wrong."""
    sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
    recomputed = prompt = cached = 0
    if start < sequence.num_ever_computed:
        recomputed = min(end, sequence.num_ever_computed) - start
    if end > sequence.num_ever_computed:
        sequence.num_ever_computed = end
    if start < sequence.num_prompt_tokens:
        is_first = sequence.num_charged_tokens == sequence.num_cached_tokens and recomputed == 0
        cached = sequence.num_cached_tokens if is_first else 0
        charged = max(sequence.num_charged_tokens, min(end, sequence.num_prompt_tokens))
        prompt = charged - sequence.num_charged_tokens
        sequence.num_charged_tokens = charged
    refused = num_refused if chunk.drafted else 0
    return Work(
        sequence, prompt, cached, num_sampled, recomputed, refused, start - chunk.shift, chunk.num_computed
    )
