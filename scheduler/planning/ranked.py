"""Sequences in order of rank, any of which can be taken out."""

from __future__ import annotations

import heapq
import itertools
from typing import TypeAlias

from scheduler.request import Sequence

Rank: TypeAlias = tuple[float, ...]
"""Lower goes earlier."""


class Ranked:
    """A heap of sequences. Adding and removing one take O(log n) over time, and what was removed is not kept: its
    entry stays until it comes to the top or until half of all entries are such ones, when they are cleared out."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Sequence]] = []
        self._serials: dict[tuple[str, int], int] = {}  # of the members' entries
        self._next = itertools.count()

    def push(self, rank: Rank, sequence: Sequence) -> None:
        serial = next(self._next)
        self._serials[sequence.key] = serial
        heapq.heappush(self._heap, (rank, serial, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Raises `KeyError` for one that is not a member."""
        del self._serials[sequence.key]
        if len(self._heap) > 2 * len(self._serials) + 8:
            self._heap = [entry for entry in self._heap if self._is_member(entry)]
            heapq.heapify(self._heap)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.key in self._serials

    @property
    def first(self) -> tuple[Rank, Sequence] | None:
        """The member of the lowest rank; of several, the one that was added first."""
        while self._heap and not self._is_member(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    @property
    def num_entries(self) -> int:
        """Entries that are kept, those of removed ones among them."""
        return len(self._heap)

    def _is_member(self, entry: tuple[Rank, int, Sequence]) -> bool:
        return self._serials.get(entry[2].key) == entry[1]

    def __len__(self) -> int:
        return len(self._serials)
