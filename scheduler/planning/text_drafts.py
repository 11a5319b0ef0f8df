"""Guesses that take no model: from the sequence's own text, what its client expects, what its grammar forces."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace

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


@dataclass(slots=True)
class _Allotment:
    """How many guesses each candidate gets, and what the step then is."""

    counts: list[int]
    """By candidate."""
    expected: list[float]
    """How many tokens each chunk of the plan can be expected to give, or 1 if it gives none yet."""
    num_tokens: int
    attended: int
    seconds: float
    total: float
    """Tokens that count: those that are known, and of the guessed ones so many as can be expected to be right."""

    def copy(self) -> _Allotment:
        return replace(self, counts=list(self.counts), expected=list(self.expected))


class TextDrafts:
    """As many guesses as pay: the likeliest first; or, where not all would gain from these as much as the step
    grows, everybody's first, then everybody's second, and so on."""

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
        allotment = self._allot(room, candidates)
        for candidate, count in zip(candidates, allotment.counts, strict=True):
            chunk = plan.chunks[candidate.place]
            text = self._texts[chunk.sequence.key]
            if count == 0:
                text.records[text.size].rest()
            elif room.reserve(chunk.sequence, count):
                kind, guesses = text.guesses(chunk.sequence, candidate.match, count)
                plan.chunks[candidate.place] = chunk._replace(drafted=tuple(guesses), draft_kind=kind)
                room.num_tokens -= count
        return allotment.expected

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

    def _allot(self, room: DraftRoom, candidates: list[_Candidate]) -> _Allotment:
        """What raises the tokens a second most, of what nobody has to wait for longer than it gains."""
        nothing = self._nothing(room.plan, candidates)
        likeliest = self._likeliest(room, candidates, room.longest)
        if likeliest.seconds <= room.patience(likeliest.expected) * nothing.seconds:
            return likeliest
        # Some would wait for the others' guesses. So all get some; or few do, for which hardly anybody waits.
        longest = room.patience(nothing.expected) * nothing.seconds
        few = self._likeliest(room, candidates, min(room.longest, longest))
        even = self._even(room, candidates)
        return even if even.total * few.seconds > few.total * even.seconds else few

    def _nothing(self, plan: Plan, candidates: list[_Candidate]) -> _Allotment:
        seconds = self._cost.predict(plan.num_tokens, plan.attended)
        counts, expected = [0] * len(candidates), [1.0] * len(plan.chunks)
        return _Allotment(counts, expected, plan.num_tokens, plan.attended, seconds, float(plan.num_tokens))

    def _likeliest(self, room: DraftRoom, candidates: list[_Candidate], longest: float) -> _Allotment:
        """The likeliest guess first, for as long as one more raises the tokens a second."""
        allotment = self._nothing(room.plan, candidates)
        ahead = [(-candidate.probability, order) for order, candidate in enumerate(candidates)]
        heapq.heapify(ahead)
        left = room.num_tokens
        while ahead and left > 0:
            chance, order = -ahead[0][0], ahead[0][1]
            candidate = candidates[order]
            if not self._add(room.plan, allotment, order, candidate, chance, longest):
                break
            left -= 1
            if allotment.counts[order] < candidate.most:
                heapq.heapreplace(ahead, (-chance * candidate.probability, order))
            else:
                heapq.heappop(ahead)
        return allotment

    def _even(self, room: DraftRoom, candidates: list[_Candidate]) -> _Allotment:
        """Everybody's first guess, everybody's second, for as long as one more raises the tokens a second; as many
        levels as everybody gains from at least as much as the step takes longer."""
        allotment = self._nothing(room.plan, candidates)
        best, shortest = allotment.copy(), allotment.seconds
        active = list(range(len(candidates)))
        left, level = room.num_tokens, 0
        while active:
            level += 1
            active = [
                order
                for order in active[:left]
                if candidates[order].most >= level
                and self._add(
                    room.plan,
                    allotment,
                    order,
                    candidates[order],
                    candidates[order].probability ** level,
                    room.longest,
                )
            ]
            left -= len(active)
            if allotment.seconds <= room.patience(allotment.expected) * shortest:
                best = allotment.copy()
        return best

    def _add(
        self, plan: Plan, allotment: _Allotment, order: int, candidate: _Candidate, chance: float, longest: float
    ) -> bool:
        """One guess more, which is right with a chance of so much, unless it pays too little or takes too long."""
        keys = plan.chunks[candidate.place].end + allotment.counts[order] + 1
        seconds = self._cost.predict(allotment.num_tokens + 1, allotment.attended + keys)
        if seconds > longest or chance * allotment.seconds <= allotment.total * (seconds - allotment.seconds):
            return False
        allotment.counts[order] += 1
        allotment.expected[candidate.place] += chance
        allotment.num_tokens += 1
        allotment.attended += keys
        allotment.seconds = seconds
        allotment.total += chance
        return True
