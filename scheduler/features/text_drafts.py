"""Guesses that take no model: from the sequence's own text, what its client expects, what its grammar forces."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from scheduler.core.plan import Chunk
from scheduler.core.sequence import Sequence
from scheduler.core.step import DraftKind
from scheduler.features.draft_allotment import Allotter, Candidate, Plain
from scheduler.features.draft_record import DraftRecord
from scheduler.features.draft_room import DraftRoom
from scheduler.features.ngram import SIZES, Match, NgramIndex, continuation
from scheduler.features.step_cost import StepCost

FORCED = 0
"""Stands for a size: nothing has to have been the same before what a grammar forces."""

PRIOR = {**dict(zip(SIZES, (0.8, 0.6, 0.3), strict=True)), FORCED: 0.98}
"""The share of guesses that are right, by how many tokens were the same before them: until more is known."""


INDEXED_TOKENS = 1024
"""Of all texts together, what a step takes into their indexes: some 2 ms. A long prompt is looked up as far as it
is there."""


@dataclass(slots=True)
class _Text:
    """Where one sequence's guesses come from."""

    given: NgramIndex
    """Of what the client expects in the answer, and of the prompt: the request's other sequences have the same."""
    index: NgramIndex
    """Of these and what came after them."""
    tokens: list[int] = field(default_factory=list)
    """What the client expects in the answer, and the sequence's own."""
    records: dict[int, DraftRecord] = field(
        default_factory=lambda: {size: DraftRecord(prior) for size, prior in PRIOR.items()}
    )
    likeliest: float = max(PRIOR[size] for size in SIZES)
    """The probability of the likeliest guess that it could have, of those that nothing forces."""
    size: int = 0
    """Of the match behind the guesses under way."""
    forced: list[int] = field(default_factory=list)
    """What has to come next."""

    def can_be(self, least: float) -> bool:
        """Whether it may have guesses that are likelier than that. To look for them takes longer."""
        return bool(self.forced) or self.likeliest > least

    def rest(self) -> None:
        """A guess there was, and it was not made."""
        self.records[self.size].rest()
        self._note_likeliest()

    def learn(self, num_drafted: int, num_right: int) -> None:
        """So many of the guesses under way were right."""
        self.records[self.size].learn(num_drafted, num_right)
        self._note_likeliest()

    def _note_likeliest(self) -> None:
        self.likeliest = max(self.records[size].probability for size in SIZES)

    def extend(self, sequence: Sequence, most: int) -> int:
        """Take in what the sequence has now, `most` tokens at most; returns how many."""
        prediction = sequence.request.prediction
        if not prediction:
            self.tokens = sequence.token_ids
        else:
            self.tokens = self.tokens or list(prediction)
            self.tokens += sequence.token_ids[len(self.tokens) - len(prediction) :]
        num_missing = len(prediction) + sequence.num_prompt_tokens - self.given.num_indexed
        num_taken = self.given.extend(self.tokens, min(most, num_missing))
        return num_taken + self.index.extend(self.tokens, most - num_taken)

    def match(self, sequence: Sequence) -> Match | None:
        """Where in the text the sequence seems to be."""
        if self.forced:
            return Match(FORCED, 0)
        if sequence.request.prediction and sequence.num_output_tokens == 0:
            return Match(SIZES[0], 0)  # what is expected begins
        return self.index.match(self.tokens)

    def guesses(self, sequence: Sequence, match: Match, count: int) -> tuple[DraftKind, list[int]]:
        """Where they are from, and as many tokens."""
        if match.size == FORCED:
            return "grammar", self.forced[:count]
        is_expected = match.place < len(sequence.request.prediction)
        return "prediction" if is_expected else "ngram", continuation(self.tokens, match.place, count)


class TextDrafts:
    """The likeliest continuations of each sequence (`NgramIndex`), as many as pay."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._allotter = Allotter(cost)
        self._texts: dict[tuple[str, int], _Text] = {}
        self._given: WeakValueDictionary[str, NgramIndex] = WeakValueDictionary()
        """By request, for as long as one of its sequences has a text."""

    def draft(self, room: DraftRoom) -> None:
        """Put guesses behind the plan's chunks."""
        plan = room.plan
        plain = Plain.of(plan, self._cost)
        matches = self._matches(room, self._allotter.least(plain))
        if not matches:
            return
        candidates = [self._candidate(room, place, match) for place, match in matches.items()]
        allotment = self._allotter.allot(room, plain, candidates)
        room.stretch = allotment.stretch
        for candidate, count in zip(candidates, allotment.counts, strict=True):
            chunk = plan.chunks[candidate.place]
            text = self._texts[chunk.sequence.key]
            if count == 0:
                text.rest()
            elif room.reserve(chunk.sequence, count):
                kind, guesses = text.guesses(chunk.sequence, matches[candidate.place], count)
                plan.chunks[candidate.place] = chunk._replace(drafted=tuple(guesses), draft_kind=kind)
                room.num_tokens -= count

    def learn(self, chunk: Chunk, num_right: int) -> None:
        """So many of a chunk's guesses were right."""
        self._texts[chunk.sequence.key].learn(len(chunk.drafted), num_right)

    def force(self, sequence: Sequence, tokens: list[int]) -> None:
        """These have to come next; often none."""
        if tokens or sequence.key in self._texts:
            self._text(sequence).forced = tokens

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._texts.pop(sequence.key, None)

    def _text(self, sequence: Sequence) -> _Text:
        text = self._texts.get(sequence.key)
        if text is None:
            request = sequence.request
            given = self._given.setdefault(request.request_id, NgramIndex())
            index = NgramIndex(given, len(request.prediction) + sequence.num_prompt_tokens)
            text = self._texts[sequence.key] = _Text(given, index)
        return text

    def _matches(self, room: DraftRoom, least: float) -> dict[int, Match]:
        """By place in the plan, where in its text a sequence seems to be: of those whose guesses are likelier than
        `least`."""
        matches = {}
        left = INDEXED_TOKENS
        for place, (chunk, most) in enumerate(zip(room.plan.chunks, room.most, strict=True)):
            if most <= 0 or not (text := self._text(chunk.sequence)).can_be(least):
                continue
            left -= text.extend(chunk.sequence, left)
            if (match := text.match(chunk.sequence)) is None:
                continue
            text.size = match.size
            if text.records[match.size].probability > least:
                matches[place] = match
            else:
                text.rest()
        return matches

    def _candidate(self, room: DraftRoom, place: int, match: Match) -> Candidate:
        text = self._texts[room.plan.chunks[place].sequence.key]
        most = min(room.most[place], len(text.forced)) if match.size == FORCED else room.most[place]
        return Candidate(place, text.records[match.size].probability, most)
