"""Members in order of rank, any of which can be taken out or given another rank."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeAlias, TypeVar

Rank: TypeAlias = tuple[float, ...]
"""Lower goes earlier."""

Member = TypeVar("Member", bound=Hashable)


class Ranked(Generic[Member]):
    """A heap of members. Adding, moving and removing one take O(log n) over time, and what was removed is not
    kept: its entry stays until it comes to the top or until half of all entries are such ones, when they are
    cleared out."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Member]] = []
        self._serials: dict[Member, int] = {}  # of the members' entries
        self._next = itertools.count()

    def push(self, rank: Rank, member: Member) -> None:
        """Add a member, or give it another rank."""
        serial = next(self._next)
        self._serials[member] = serial
        heapq.heappush(self._heap, (rank, serial, member))
        self._clear_out()

    def remove(self, member: Member) -> None:
        """Raises `KeyError` for one that is not a member."""
        del self._serials[member]
        self._clear_out()

    def discard(self, member: Member) -> None:
        """Remove it if it is a member."""
        if member in self._serials:
            self.remove(member)

    def __contains__(self, member: Member) -> bool:
        return member in self._serials

    @property
    def first(self) -> tuple[Rank, Member] | None:
        """The member of the lowest rank; of several, the one that got it first."""
        while self._heap and not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def _clear_out(self) -> None:
        if len(self._heap) > 2 * len(self._serials) + 8:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def _is_current(self, entry: tuple[Rank, int, Member]) -> bool:
        return self._serials.get(entry[2]) == entry[1]

    def __len__(self) -> int:
        return len(self._serials)
