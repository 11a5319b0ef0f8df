"""Who is admitted next, and who gives way when blocks run out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from scheduler.request import Sequence


class Policy(Protocol):
    """The queue of waiting sequences, and the choice of a victim. No method may take O(queue length)."""

    def add(self, sequence: Sequence) -> None:
        """A new sequence arrives."""

    def requeue(self, sequence: Sequence) -> None:
        """A preempted sequence comes back, to be resumed."""

    def remove(self, sequence: Sequence) -> None:
        """A waiting sequence leaves the queue: admitted, or aborted."""

    def peek(self) -> Sequence | None:
        """The sequence to admit next, or None if nobody waits."""

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """The sequence among `running` (never empty) to preempt when blocks run out."""

    def __len__(self) -> int:
        """How many wait."""


class FirstComeFirstServed:
    """Admit in order of arrival; preempt the latest arrival, and let it be the first to resume."""

    def __init__(self) -> None:
        self._queue: OrderedDict[tuple[str, int], Sequence] = OrderedDict()

    def add(self, sequence: Sequence) -> None:
        self._queue[sequence.key] = sequence

    def requeue(self, sequence: Sequence) -> None:
        self._queue[sequence.key] = sequence
        self._queue.move_to_end(sequence.key, last=False)

    def remove(self, sequence: Sequence) -> None:
        del self._queue[sequence.key]

    def peek(self) -> Sequence | None:
        return next(iter(self._queue.values()), None)

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=lambda sequence: sequence.arrival)

    def __len__(self) -> int:
        return len(self._queue)
