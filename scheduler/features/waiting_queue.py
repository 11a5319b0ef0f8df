"""Waiting sequences of one user, in their order."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.core.ranked import Rank, Ranked
from scheduler.core.sequence import Sequence


class WaitingQueue:
    """Waiting sequences, lowest rank first; a rank does not change while its sequence waits."""

    def __init__(self, rank: Callable[[Sequence], Rank]) -> None:
        self._rank = rank
        self._members: Ranked[Sequence] = Ranked()

    def push(self, sequence: Sequence) -> None:
        self._members.push(self._rank(sequence), sequence)

    def remove(self, sequence: Sequence) -> None:
        self._members.remove(sequence)

    @property
    def first(self) -> Sequence | None:
        first = self._members.first
        return None if first is None else first[1]

    def __len__(self) -> int:
        return len(self._members)
