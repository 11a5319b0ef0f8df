"""What a policy is asked where seats change hands and users are told apart, and one that goes by priority."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from scheduler.core.policy import FirstComeFirstServed, Policy
from scheduler.core.ranked import Rank, Ranked
from scheduler.core.sequence import Sequence
from scheduler.features.giving_way import Loss, Owed
from scheduler.features.waiting_queue import WaitingQueue


class SharingPolicy(Policy, Owed, Protocol):
    """A policy that `carousel serve` can take."""

    def hold_back(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        """Who of `decoding` may decode in this step, and how many tokens it may compute of the prompts of those
        who get what the others leave."""

    def is_newcomer(self, sequence: Sequence) -> bool:
        """Whether a sequence that was just seated is all that its user asks for, and should not wait for a whole
        step of all the others."""

    @property
    def gap(self) -> float:
        """How unequally those who wait were served: see `FairShare`; 0 for a policy that knows no users."""


class ArrivalOrder(FirstComeFirstServed):
    """Admit in order of arrival; where a user's first does not fit, other users' may pass it. Nobody gives way."""

    def __init__(self) -> None:
        self._queues: dict[str, WaitingQueue] = {}  # by user: where the first does not fit, others pass it
        self._heads: Ranked[str] = Ranked()  # users, by the rank of their first
        self._passed: list[str] = []
        self._num_waiting = 0

    def add(self, sequence: Sequence) -> None:
        user = sequence.request.user
        self._queues.setdefault(user, WaitingQueue(self.rank)).push(sequence)
        self._num_waiting += 1
        self._refresh(user)

    def withdraw(self, sequence: Sequence) -> None:
        user = sequence.request.user
        self._queues[user].remove(sequence)
        self._num_waiting -= 1
        self._refresh(user)

    def begin(self) -> None:
        passed, self._passed = self._passed, []
        for user in passed:
            self._refresh(user)

    def peek(self) -> Sequence | None:
        head = self._heads.first
        return None if head is None else self._queues[head[1]].first

    def pass_over(self, sequence: Sequence) -> None:
        self._passed.append(sequence.request.user)
        self._refresh(sequence.request.user)

    def _refresh(self, user: str) -> None:
        first = self._queues[user].first if user in self._queues else None
        if first is None:
            self._queues.pop(user, None)
        if first is None or user in self._passed:
            self._heads.discard(user)
        else:
            self._heads.push(self.rank(first), user)

    def __len__(self) -> int:
        return self._num_waiting

    def hold_back(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        return decoding, 0

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
