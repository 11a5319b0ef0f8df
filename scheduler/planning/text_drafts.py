"""Guesses that take no model: from the sequence's own text, what its client expects, what its grammar forces."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from scheduler.planning.draft_record import DraftRecord
from scheduler.planning.draft_room import DraftRoom
from scheduler.planning.ngram import SIZES, Match, NgramIndex, continuation
from scheduler.planning.plan import Chunk, Plan
from scheduler.planning.step_cost import StepCost
from scheduler.request import Sequence
from scheduler.step import DraftKind

FORCED = 0
"""Stands for a size: nothing has to have been the same before what a grammar forces."""

PRIOR = {**dict(zip(SIZES, (0.8, 0.6, 0.3), strict=True)), FORCED: 0.98}
"""The share of guesses that are right, by how many tokens were the same before them: until more is known."""


@dataclass(slots=True)
class _Text:
    """Where one sequence's guesses come from."""

    tokens: list[int] = field(default_factory=list)
    """What the client expects in the answer, and the sequence's own."""
    index: NgramIndex = field(default_factory=NgramIndex)
    records: dict[int, DraftRecord] = field(
        default_factory=lambda: {size: DraftRecord(prior) for size, prior in PRIOR.items()}
    )
    size: int = 0
    """Of the match behind the guesses under way."""
    forced: list[int] = field(default_factory=list)
    """What has to come next."""

    def match(self, sequence: Sequence) -> Match | None:
        """Where in the text the sequence seems to be."""
        if self.forced:
            return Match(FORCED, 0)
        prediction = sequence.request.prediction
        if not prediction:
            self.tokens = sequence.token_ids
        else:
            self.tokens = self.tokens or list(prediction)
            self.tokens += sequence.token_ids[len(self.tokens) - len(prediction) :]
        self.index.extend(self.tokens)
        if prediction and sequence.num_output_tokens == 0:
            return Match(SIZES[0], 0)  # what is expected begins
        return self.index.match(self.tokens)

    def guesses(self, sequence: Sequence, match: Match, count: int) -> tuple[DraftKind, list[int]]:
        """Where they are from, and as many tokens."""
        if match.size == FORCED:
            return "grammar", self.forced[:count]
        is_expected = match.place < len(sequence.request.prediction)
        return "prediction" if is_expected else "ngram", continuation(self.tokens, match.place, count)


@dataclass(slots=True)
class _Candidate:
    """A chunk that could have guesses behind it."""

    place: int
    """In the plan."""
    match: Match
    """Where in the text they would come from."""
    probability: float
    """That the next guess is right, if those before it are."""
    most: int
    count: int = 0


class TextDrafts:
    """The likeliest continuations first (`NgramIndex`), as many as pay."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._texts: dict[tuple[str, int], _Text] = {}

    def draft(self, room: DraftRoom) -> list[float]:
        """Put guesses behind the plan's chunks. Returns how many tokens each can be expected to give, or 1 if it
        gives none yet."""
        plan = room.plan
        candidates = self._candidates(room)
        if not candidates:
            return [1.0] * len(plan.chunks)
        seconds = self._cost.predict(plan.num_tokens, plan.attended)
        expected = self._allot(plan, candidates, room.num_tokens, room.longest)
        if self._seconds(plan, candidates) > room.patience(expected) * seconds:
            longest = room.patience([1.0] * len(expected)) * seconds
            expected = self._allot(plan, candidates, room.num_tokens, min(room.longest, longest))
        for candidate in candidates:
            chunk = plan.chunks[candidate.place]
            text = self._texts[chunk.sequence.key]
            if candidate.count == 0:
                text.records[text.size].rest()
            elif room.reserve(chunk.sequence, candidate.count):
                kind, guesses = text.guesses(chunk.sequence, candidate.match, candidate.count)
                plan.chunks[candidate.place] = chunk._replace(drafted=tuple(guesses), draft_kind=kind)
                room.num_tokens -= candidate.count
        return expected

    def learn(self, chunk: Chunk, num_right: int) -> None:
        """So many of a chunk's guesses were right."""
        text = self._texts[chunk.sequence.key]
        text.records[text.size].learn(len(chunk.drafted), num_right)

    def force(self, sequence: Sequence, tokens: list[int]) -> None:
        """These have to come next; often none."""
        if tokens or sequence.key in self._texts:
            self._texts.setdefault(sequence.key, _Text()).forced = tokens

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._texts.pop(sequence.key, None)

    def _candidates(self, room: DraftRoom) -> list[_Candidate]:
        found = []
        for place, (chunk, most) in enumerate(zip(room.plan.chunks, room.most, strict=True)):
            if most <= 0:
                continue
            text = self._texts.setdefault(chunk.sequence.key, _Text())
            match = text.match(chunk.sequence)
            if match is not None:
                text.size = match.size
                longest = min(most, len(text.forced) or most)
                found.append(_Candidate(place, match, text.records[match.size].probability, longest))
        return found

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
