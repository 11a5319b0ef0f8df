"""Which tokens are guessed, so that a step can give a sequence several: speculative decoding.

A step computes the guessed tokens of a sequence behind its known ones, and keeps them for as long as they are what
would have been sampled (Leviathan et al., arXiv 2211.17192, where the sampled token is a function of its place):
no bit of an answer changes. A guess costs what a row more costs the step, and that is little only while the step
waits for memory. So a token is guessed where that makes the whole batch faster, as far as the model of a step's
cost and the sequence's own record can tell, and where no other sequence waits longer for it than what it gains.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.planning.ngram import SIZES, Match, NgramIndex, continuation
from scheduler.planning.plan import Chunk, Plan
from scheduler.planning.step_cost import StepCost
from scheduler.request import Sequence
from scheduler.step import DraftKind

MOST_DRAFTED = 15
"""Tokens guessed for one sequence in one step."""

PRIOR = dict(zip(SIZES, (0.8, 0.6, 0.3), strict=True))
"""The share of guesses that are right, by how many tokens were the same before them: until more is known."""

PRIOR_WEIGHT = 2.0
"""How many guesses that counts for."""

MEMORY = 0.9
"""How much a verified guess still counts at the sequence's next one."""

IDLE_MEMORY = 0.98
"""How much it counts after a step in which none was made: what went wrong once is tried again."""

SLOWDOWN = 1.05
"""Times what a sequence gains, that a step may take longer for the others' guesses."""

FIRST_GAIN = 1.5
"""Tokens a step that a sequence is taken to get before it has shown what it gets."""

GAIN_MEMORY = 0.9
"""How much of that is left after each step."""

Reserve = Callable[[Sequence, int], bool]
"""Makes room for so many guessed tokens of a sequence, if there is any to spare."""


@dataclass(slots=True)
class _Record:
    """Of the guesses after matches of one size."""

    right: float = 0.0
    tested: float = 0.0

    def probability(self, size: int) -> float:
        return (self.right + PRIOR_WEIGHT * PRIOR[size]) / (self.tested + PRIOR_WEIGHT)

    def fade(self, share: float) -> None:
        self.right *= share
        self.tested *= share


@dataclass(slots=True)
class _Draftee:
    """What is known of one sequence."""

    text: list[int] = field(default_factory=list)
    """Where guesses come from: what the client expects in the answer, and the sequence's own tokens."""
    index: NgramIndex = field(default_factory=NgramIndex)
    records: dict[int, _Record] = field(default_factory=lambda: {size: _Record() for size in SIZES})
    gain: float = FIRST_GAIN
    """Tokens a step, lately."""
    size: int = 0
    """Of the match behind the guesses under way."""

    def match(self, sequence: Sequence) -> Match | None:
        """Where in the text the sequence seems to be."""
        prediction = sequence.request.prediction
        if not prediction:
            self.text = sequence.token_ids
        else:
            self.text = self.text or list(prediction)
            self.text += sequence.token_ids[len(self.text) - len(prediction) :]
        self.index.extend(self.text)
        if prediction and sequence.num_output_tokens == 0:
            return Match(SIZES[0], 0)  # what is expected begins
        return self.index.match(self.text)


@dataclass(slots=True)
class _Candidate:
    """A chunk that could have guesses behind it."""

    place: int
    """In the plan."""
    match: int
    """Where in the text they would come from."""
    probability: float
    """That the next guess is right, if those before it are."""
    most: int
    count: int = 0


class Speculation:
    """Guesses from each sequence's own text and from what its client expects (`NgramIndex`), as many as pay."""

    def __init__(self, cost: StepCost, max_model_len: int) -> None:
        self._cost = cost
        self._max_model_len = max_model_len
        self._draftees: dict[tuple[str, int], _Draftee] = {}

    def draft(self, plan: Plan, room: int, reserve: Reserve, longest: float | None = None) -> None:
        """Put guesses behind the chunks of a plan: `room` tokens at most, and only as far as the step, by what is
        known of its cost, takes no more than `longest` seconds."""
        candidates = self._candidates(plan.chunks, room)
        if not candidates:
            return
        gains = [self._gain(chunk) for chunk in plan.chunks]
        seconds = self._cost.predict(plan.num_tokens, plan.attended)
        limit = longest if longest is not None else float("inf")
        expected = self._allot(plan, candidates, room, limit)
        slowest = min(max(gain, now) for gain, now in zip(gains, expected, strict=True))
        if self._seconds(plan, candidates) > SLOWDOWN * slowest * seconds:
            self._allot(plan, candidates, room, min(limit, SLOWDOWN * min(gains) * seconds))
        for candidate in candidates:
            chunk = plan.chunks[candidate.place]
            draftee = self._draftees[chunk.sequence.key]
            if candidate.count == 0:
                draftee.records[draftee.size].fade(IDLE_MEMORY)
            elif reserve(chunk.sequence, candidate.count):
                guesses = continuation(draftee.text, candidate.match, candidate.count)
                is_expected = candidate.match < len(chunk.sequence.request.prediction)
                kind: DraftKind = "prediction" if is_expected else "ngram"
                plan.chunks[candidate.place] = chunk._replace(drafted=tuple(guesses), draft_kind=kind)

    def learn(self, chunk: Chunk, num_kept: int) -> None:
        """A chunk that samples gave so many tokens: one, and the guesses before it that were right."""
        draftee = self._draftees.get(chunk.sequence.key)
        if draftee is None:
            return
        draftee.gain += (1 - GAIN_MEMORY) * (num_kept - draftee.gain)
        if chunk.drafted:
            record = draftee.records[draftee.size]
            record.fade(MEMORY)
            record.right += num_kept - 1
            record.tested += min(num_kept, len(chunk.drafted))

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._draftees.pop(sequence.key, None)

    def _gain(self, chunk: Chunk) -> float:
        """Tokens a step that the chunk's sequence gets lately; one that computes its prompt gets no more than one
        for what it waits."""
        draftee = self._draftees.get(chunk.sequence.key)
        return max(1.0, draftee.gain) if draftee is not None and chunk.samples else 1.0

    def _candidates(self, chunks: list[Chunk], room: int) -> list[_Candidate]:
        found = []
        for place, chunk in enumerate(chunks):
            sequence = chunk.sequence
            most = min(room, self.most(chunk))
            if most <= 0:
                continue
            draftee = self._draftees.setdefault(sequence.key, _Draftee())
            match = draftee.match(sequence)
            if match is not None:
                draftee.size = match.size
                probability = draftee.records[match.size].probability(match.size)
                found.append(_Candidate(place, match.place, probability, most))
        return found

    def most(self, chunk: Chunk) -> int:
        """How many guesses may be behind a chunk: none but those that can become part of the answer."""
        if not chunk.samples:
            return 0
        sequence = chunk.sequence
        if sequence.window is None:
            left = self._max_model_len - sequence.num_tokens
        else:
            left = min(sequence.window.longest - sequence.num_tokens, sequence.until_shift - chunk.length + 1)
        if (max_tokens := sequence.request.params.max_tokens) is not None:
            left = min(left, max_tokens - sequence.num_output_tokens)
        return min(MOST_DRAFTED, left - 1)

    def _allot(self, plan: Plan, candidates: list[_Candidate], room: int, longest: float) -> list[float]:
        """Decide how many tokens are guessed for each: the likeliest first, for as long as a guess raises the
        tokens a second. Returns how many tokens each chunk of the plan can be expected to give, or 1 if it gives
        none yet."""
        expected = [1.0] * len(plan.chunks)
        num_tokens, attended = plan.num_tokens, plan.attended
        seconds = self._cost.predict(num_tokens, attended)
        total = float(num_tokens)
        ahead = [(-candidate.probability, order) for order, candidate in enumerate(candidates)]
        heapq.heapify(ahead)
        for candidate in candidates:
            candidate.count = 0
        while ahead and room > 0:
            probability, order = -ahead[0][0], ahead[0][1]
            candidate = candidates[order]
            keys = plan.chunks[candidate.place].end + candidate.count + 1
            longer = self._cost.predict(num_tokens + 1, attended + keys)
            if longer > longest or probability * seconds <= total * (longer - seconds):
                break
            candidate.count += 1
            room -= 1
            num_tokens, attended, seconds = num_tokens + 1, attended + keys, longer
            total += probability
            expected[candidate.place] += probability
            if candidate.count < candidate.most:
                heapq.heapreplace(ahead, (-probability * candidate.probability, order))
            else:
                heapq.heappop(ahead)
        return expected

    def _seconds(self, plan: Plan, candidates: list[_Candidate]) -> float:
        """Of the step with its guesses."""
        num_guesses = sum(candidate.count for candidate in candidates)
        keys = sum(candidate.count * plan.chunks[candidate.place].end for candidate in candidates)
        return self._cost.predict(plan.num_tokens + num_guesses, plan.attended + keys)
