"""How many tokens are guessed for whom in one step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.core.plan import Plan
from scheduler.features.draft_room import DraftRoom
from scheduler.features.step_cost import StepCost

MARGIN = 1.15
"""Times what it costs, that a guess has to bring: neither is known exactly, and what just pays is no gain."""


class Plain(NamedTuple):
    """A step without guesses."""

    num_tokens: int
    attended: int
    seconds: float
    """That it should take."""

    @classmethod
    def of(cls, plan: Plan, cost: StepCost) -> Plain:
        num_tokens, attended = plan.num_tokens, plan.attended
        return cls(num_tokens, attended, cost.predict(num_tokens, attended))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk that could have guesses behind it."""

    place: int
    """In the plan."""
    probability: float
    """That the next guess is right, if those before it are."""
    most: int
    """Guesses."""


@dataclass(slots=True)
class Allotment:
    """How many guesses each candidate gets, and what the step then is."""

    counts: list[int]
    """By candidate."""
    expected: list[float]
    """How many tokens each chunk of the plan can be expected to give, or 1 if it gives none yet."""
    num_tokens: int
    attended: int
    seconds: float
    plain: float
    """Seconds that it would take without guesses."""
    total: float
    """Tokens that count: those that are known, and of the guessed ones so many as can be expected to be right."""

    @property
    def stretch(self) -> float:
        """How many times longer it takes for the guesses."""
        return self.seconds / self.plain

    def copy(self) -> Allotment:
        return Allotment(
            list(self.counts),
            list(self.expected),
            self.num_tokens,
            self.attended,
            self.seconds,
            self.plain,
            self.total,
        )


class Allotter:
    """As many guesses as pay: the likeliest first; or, where not all would gain from these as much as the step
    grows, everybody's first, then everybody's second, and so on."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost

    def least(self, plain: Plain) -> float:
        """A guess pays only if it is likelier than this: it has to bring the step more tokens than the time that
        it takes brings otherwise. Each guess that is in the step makes this more."""
        longer = self._cost.predict(plain.num_tokens + 1, plain.attended) - plain.seconds
        return MARGIN * plain.num_tokens * longer / plain.seconds

    def allot(self, room: DraftRoom, plain: Plain, candidates: Sequence[Candidate]) -> Allotment:
        """What raises the tokens a second most, of what nobody has to wait for longer than it gains."""
        num_chunks = len(room.plan.chunks)
        nothing = Allotment(
            [0] * len(candidates),
            [1.0] * num_chunks,
            *plain,
            plain=plain.seconds,
            total=float(plain.num_tokens),
        )
        likeliest = self._likeliest(room, candidates, nothing, room.longest)
        if likeliest.stretch <= room.patience(likeliest.expected):
            return likeliest
        # Some would wait for the others' guesses. So all get some; or few do, for which hardly anybody waits.
        longest = room.patience(nothing.expected) * nothing.seconds
        few = self._likeliest(room, candidates, nothing, min(room.longest, longest))
        even = self._even(room, candidates, nothing)
        return even if even.total * few.seconds > few.total * even.seconds else few

    def _likeliest(
        self, room: DraftRoom, candidates: Sequence[Candidate], nothing: Allotment, longest: float
    ) -> Allotment:
        """The likeliest guess first, for as long as one more raises the tokens a second."""
        allotment = nothing.copy()
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

    def _even(self, room: DraftRoom, candidates: Sequence[Candidate], nothing: Allotment) -> Allotment:
        """Everybody's first guess, everybody's second, for as long as one more raises the tokens a second; as many
        levels as everybody gains from at least as much as the step takes longer."""
        allotment, best = nothing.copy(), nothing
        active = list(range(len(candidates)))
        left, level = room.num_tokens, 0
        while active:
            level += 1
            added = []
            for order in active[:left]:
                candidate = candidates[order]
                chance = candidate.probability**level
                if candidate.most >= level and self._add(
                    room.plan, allotment, order, candidate, chance, room.longest
                ):
                    added.append(order)
            active, left = added, left - len(added)
            if allotment.stretch <= room.patience(allotment.expected):
                best = allotment.copy()
        return best

    def _add(
        self, plan: Plan, allotment: Allotment, order: int, candidate: Candidate, chance: float, longest: float
    ) -> bool:
        """One guess more, which is right with a chance of so much, unless it pays too little or takes too long."""
        keys = plan.chunks[candidate.place].end + allotment.counts[order] + 1
        seconds = self._cost.predict(allotment.num_tokens + 1, allotment.attended + keys)
        costs = MARGIN * allotment.total * (seconds - allotment.seconds)
        if seconds > longest or chance * allotment.seconds <= costs:
            return False
        allotment.counts[order] += 1
        allotment.expected[candidate.place] += chance
        allotment.num_tokens += 1
        allotment.attended += keys
        allotment.seconds = seconds
        allotment.total += chance
        return True
