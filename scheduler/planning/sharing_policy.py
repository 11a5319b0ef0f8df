"""What a policy is asked where seats change hands and users are told apart, and one that goes by priority."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from scheduler.planning.giving_way import Loss, Owed
from scheduler.planning.policy import FirstComeFirstServed, Policy
from scheduler.planning.ranked import Rank
from scheduler.planning.sequence import Sequence


class SharingPolicy(Policy, Owed, Protocol):
    """A policy that `carousel serve` can take."""

    def is_newcomer(self, sequence: Sequence) -> bool:
        """Whether a sequence that was just seated is all that its user asks for, and should not wait for a whole
        step of all the others."""

    @property
    def gap(self) -> float:
        """How unequally those who wait were served: see `FairShare`; 0 for a policy that knows no users."""


class ArrivalOrder(FirstComeFirstServed):
    """Admit in order of arrival; nobody gives way."""

    def is_newcomer(self, sequence: Sequence) -> bool:
        return False

    def yielding(self, candidate: Sequence, running: Collection[Sequence], loss: Loss) -> Iterator[Sequence]:
        return iter(())

    @property
    def gap(self) -> float:
        return 0.0


class PriorityFirst(ArrivalOrder):
    """Admit by priority, then arrival; a request of a higher class takes the seat of a lower one's."""

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.request.priority, sequence.arrival)

    def yielding(self, candidate: Sequence, running: Collection[Sequence], loss: Loss) -> Iterator[Sequence]:
        lower = [sequence for sequence in running if sequence.request.priority > candidate.request.priority]
        return iter(sorted(lower, key=self.rank, reverse=True))
