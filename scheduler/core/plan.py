"""What one step computes, chunk by chunk, how that is put together, and what each sequence gained by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.core.policy import Work
from scheduler.core.seams import Pace
from scheduler.core.sequence import Sequence
from scheduler.core.step import ChunkInput, ChunkResult, DraftKind, SeatChanges, StepInput, num_attended


class Chunk(NamedTuple):
    """One sequence's part of a step: compute its tokens `[start, start + length)`."""

    sequence: Sequence
    start: int
    length: int
    seat: int
    """Where the sequence sits while the step runs; it may have left when the step is looked at."""
    samples: bool
    """Whether the chunk reaches the last known token, so that the next one is sampled."""
    drafted: tuple[int, ...] = ()
    """Guesses of the tokens after the last known one, which the step computes too."""
    draft_kind: DraftKind = "ngram"
    """Where they come from."""
    shift: int = 0
    """How many tokens before `start` have been dropped."""

    @classmethod
    def of(cls, sequence: Sequence, length: int) -> Chunk:
        """A running sequence's next `length` tokens."""
        start, lease = sequence.num_computed_tokens, sequence.held
        samples = start + length == len(sequence.token_ids) and sequence.request.params.max_tokens != 0
        return cls(sequence, start, length, lease.seat, samples, shift=lease.shift)

    def input(self) -> ChunkInput:
        """The chunk as data, with the tokens that the sequence has now."""
        sequence, request = self.sequence, self.sequence.request
        is_first = self.start == sequence.held.num_cached_tokens
        first_scored = max(self.start, sequence.num_ever_computed)
        return ChunkInput(
            request.request_id,
            sequence.index,
            self.seat,
            self.start,
            [*sequence.token_ids[self.start : self.end], *self.drafted],
            len(self.drafted),
            self.samples,
            request.params,
            sequence.num_prompt_tokens,
            sequence.token_ids[: self.start] if is_first and request.params.is_steered else None,
            first_scored,
            request.prompt_token_ids[first_scored + 1 : self.end + 1] if sequence.is_scored else [],
            self._num_pooled,
            self.shift,
            sequence.is_long,
        )

    @property
    def _num_pooled(self) -> int:
        """What has been computed before a preemption is in the embedding already."""
        match self.sequence.request.params.pooling:
            case "mean":
                return max(0, self.end - max(self.start, self.sequence.num_ever_computed))
            case "last":
                return int(self.end == self.sequence.num_tokens)
        return 0

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_computed(self) -> int:
        """Its tokens with the guessed ones."""
        return self.length + len(self.drafted)

    @property
    def attended(self) -> int:
        """Keys that its queries look at."""
        return num_attended(self.start - self.shift, self.num_computed)


@dataclass(slots=True)
class Plan:
    """What one step computes. The chunks' order is the order of the packed batch."""

    chunks: list[Chunk]
    admitted: list[Sequence] = field(default_factory=list)
    """Sequences that got their first seat."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that lost their seat while this plan was made."""
    num_yielded: int = 0
    """How many of them gave way to somebody who waited, rather than for want of blocks."""
    changes: SeatChanges = field(default_factory=SeatChanges)
    stretch: float = 1.0
    """How many times longer it takes for the guesses in it."""
    work: list[Work] = field(default_factory=list)
    """What was done for whom; known once the plan is committed."""

    @property
    def num_tokens(self) -> int:
        """That are computed, guessed ones too."""
        return sum(chunk.num_computed for chunk in self.chunks)

    @property
    def attended(self) -> int:
        """Keys that the step's queries look at."""
        return sum(chunk.attended for chunk in self.chunks)

    def step_input(self) -> StepInput:
        """The plan as data, to be executed."""
        chunks = [chunk.input() for chunk in self.chunks]
        return StepInput(chunks, self.changes)


MAX_SCORED_TOKENS = 256
"""How many tokens a step computes of prompts whose logprobs are wanted: each has a row of the whole vocabulary."""


class PlanBuilder:
    """A plan in the making: the budget that is left, and chunks that may still be dropped."""

    def __init__(self, budget: int, pace: Pace) -> None:
        self.budget = budget
        self.preempted: list[Sequence] = []
        self.seated: set[Sequence] = set()
        """Who got a seat in this plan, which nobody takes from them in the same one."""
        self.num_yielded = 0
        self._num_scored = 0
        self.admitted: list[Sequence] = []
        self._pace = pace
        self._num_tokens = 0
        self._attended = 0
        self._has_streams = False
        self._chunks: dict[tuple[str, int], Chunk] = {}

    def decode(self, sequence: Sequence) -> None:
        """The one token that a running sequence has yet to compute."""
        self._has_streams = True
        self._add(Chunk.of(sequence, 1))

    def prefill(self, sequence: Sequence, most: int) -> int:
        """As much of a running sequence's prompt as the budget and the streams' pace allow, and `most` tokens;
        returns how many."""
        missing = sequence.num_tokens - sequence.num_computed_tokens
        length = min(missing, self.budget, most, sequence.until_border)
        if sequence.is_scored:
            length = min(length, MAX_SCORED_TOKENS - self._num_scored)
            self._num_scored += length
        if self._has_streams:
            start = sequence.num_computed_tokens
            room = self._pace.room(self._num_tokens, self._attended, start)
            if room < length:
                length = max(room, min(length, self._pace.least(start)))
                self.budget = length  # and nothing after it
        if length > 0:
            self._add(Chunk.of(sequence, length))
        return length

    def _add(self, chunk: Chunk) -> None:
        length = chunk.length
        self._chunks[chunk.sequence.key] = chunk
        self._num_tokens += length
        self._attended += chunk.attended
        self.budget -= length

    def drop(self, sequence: Sequence) -> None:
        """A running sequence was preempted: its tokens go back to the budget."""
        self.preempted.append(sequence)
        chunk = self._chunks.pop(sequence.key, None)
        if chunk is not None:
            self.budget += chunk.length
            self._num_tokens -= chunk.length
            self._attended -= chunk.attended

    @property
    def is_empty(self) -> bool:
        """Whether it would compute nothing."""
        return not self._chunks

    @property
    def num_moves(self) -> int:
        """How often somebody was seated, or lost a seat."""
        return len(self.seated) + len(self.preempted)

    def plan(self) -> Plan:
        """Without what is new in the block tables."""
        return Plan(list(self._chunks.values()), self.admitted, self.preempted, self.num_yielded)


class Gain(NamedTuple):
    """What a step gave to one sequence."""

    chunk: Chunk
    """What was computed for it. Guesses, as far as they were right, are the first of the result's tokens."""
    result: ChunkResult
    """What came of that, up to the answer's end."""

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence


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
