"""Runs a draft model: guesses the next tokens of many sequences, pass by pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from scheduler.execution.runner import Runner
from scheduler.sampling_params import SamplingParams
from scheduler.step import ChunkInput, DraftInput, SeatChanges, StepInput, TableChange, num_attended

MEASURED = (1, 1, 16, 1, 4, 1, 16, 1)
"""Tokens of the passes that tell, before the first guess, what guessing costs."""


class DraftPass(NamedTuple):
    """What one forward pass of the draft model took."""

    num_tokens: int
    attended: int
    """Keys that its queries looked at."""
    seconds: float


class DraftRunner:
    """A draft model's runner, whose tables are those of the large model's first group of layers. Guesses are
    sampled as the large model samples, each with the number of its place: where both models think alike, both
    choose the same token, at any temperature."""

    def __init__(self, runner: Runner, vocab_size: int, target_vocab_size: int) -> None:
        self._runner = runner
        self._last_token = vocab_size - 1
        self._target_vocab_size = target_vocab_size
        self._tables: list[TableChange] = []

    def measure(self) -> list[DraftPass]:
        """What passes take, before anything is in the blocks: a draft model that seems dear is never asked, and
        what it takes would not be learned."""
        params = SamplingParams(temperature=0.0)
        return [self._run([ChunkInput("", 0, 0, 0, [0] * length, 0, True, params)])[1] for length in MEASURED]

    def follow(self, tables: Sequence[TableChange]) -> None:
        """Take note of what is new in the block tables: before each step, whether or not anything is guessed."""
        self._tables += [change for change in tables if change.group == 0]

    def draft(self, asked: Sequence[DraftInput]) -> tuple[list[list[int]], list[DraftPass]]:
        """Read what is new of each sequence, and guess as many tokens as are wanted."""
        guesses: list[list[int]] = [[] for _ in asked]
        passes = []
        chunks = [self._chunk(draft, draft.start, draft.token_ids, draft.num_wanted > 0) for draft in asked]
        places = list(range(len(asked)))
        while chunks:
            tokens, taken = self._run(chunks)
            passes.append(taken)
            following: list[tuple[int, ChunkInput]] = []
            for place, chunk, sampled in zip(places, chunks, tokens, strict=True):
                draft = asked[place]
                # A larger vocabulary may have tokens that the large model has not, and logits may be no numbers.
                if not sampled or sampled[0] >= self._target_vocab_size:
                    continue
                guesses[place].append(sampled[0])
                if len(guesses[place]) < draft.num_wanted:
                    end = chunk.start + len(chunk.token_ids)
                    following.append((place, self._chunk(draft, end, sampled, True)))
            places = [place for place, _ in following]
            chunks = [chunk for _, chunk in following]
        return guesses, passes

    def _chunk(self, draft: DraftInput, start: int, tokens: Sequence[int], samples: bool) -> ChunkInput:
        return ChunkInput(
            draft.request_id,
            draft.index,
            draft.seat,
            start,
            [min(token, self._last_token) for token in tokens],
            0,
            samples,
            draft.params,
        )

    def _run(self, chunks: list[ChunkInput]) -> tuple[list[list[int]], DraftPass]:
        started = time.monotonic()
        tables, self._tables = self._tables, []
        results = self._runner.collect(self._runner.launch(StepInput(chunks, SeatChanges(tables))))
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        attended = sum(num_attended(chunk.start, len(chunk.token_ids)) for chunk in chunks)
        tokens = [result.token_ids for result in results]
        return tokens, DraftPass(num_tokens, attended, time.monotonic() - started)
