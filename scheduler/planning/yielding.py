"""Who gives up a seat to somebody who waits: the seam that seats changing hands, and backfilling, ride on."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from scheduler.planning.seating import Seating
from scheduler.planning.sequence import Sequence


class Yielded(NamedTuple):
    """A running sequence that gives way."""

    sequence: Sequence
    loss: int
    """How many of its tokens may have to be computed again."""


class Yielding(Protocol):
    """Asked for whoever is next and does not fit, and told who comes and goes."""

    def begin(self) -> None:
        """A new plan is begun."""

    def owing(self, candidate: Sequence, seating: Seating, kept: Collection[Sequence]) -> list[Sequence]:
        """Running sequences that may have to give way to a waiting one, the first to go first. Those in `kept`
        stay."""

    def going(self, candidate: Sequence, seating: Seating, owing: list[Sequence]) -> list[Yielded] | None:
        """Who of those must go so that the waiting one has a seat and its blocks; None if all are not enough."""

    def passed(self, sequence: Sequence) -> bool:
        """It does not fit; returns whether others may pass it in this plan."""

    def seated(self, sequence: Sequence) -> None:
        """It got a seat."""

    def unseated(self, sequence: Sequence) -> None:
        """It is about to lose its seat, and comes back."""

    def forget(self, sequence: Sequence) -> None:
        """It has ended, or waits and has nothing in the pool."""


class NoYielding:
    """Whoever sits stays as long as there are blocks, and nobody passes who is next."""

    def begin(self) -> None: ...

    def owing(self, candidate: Sequence, seating: Seating, kept: Collection[Sequence]) -> list[Sequence]:
        return []

    def going(self, candidate: Sequence, seating: Seating, owing: list[Sequence]) -> list[Yielded] | None:
        return None

    def passed(self, sequence: Sequence) -> bool:
        return False

    def seated(self, sequence: Sequence) -> None: ...

    def unseated(self, sequence: Sequence) -> None: ...

    def forget(self, sequence: Sequence) -> None: ...
