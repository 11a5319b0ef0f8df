"""What a model keeps of a sequence beside keys and values: the seam that saved states ride on."""

from __future__ import annotations

from typing import Protocol

from scheduler.planning.blocks import Identity, Prefix
from scheduler.planning.sequence import Sequence
from scheduler.step import SeatChanges


class States(Protocol):
    """What seating tells whoever puts states aside."""

    def reset(self) -> None:
        """Nothing is put aside any more."""

    def reach(self, identities: list[Identity]) -> int:
        """Of a prefix's blocks, how many a sequence can begin behind."""

    def begin(self, sequence: Sequence, prefix: Prefix, changes: SeatChanges) -> None:
        """A sequence has a seat, behind a cached prefix."""

    def settle(self, sequence: Sequence, changes: SeatChanges) -> None:
        """All that a running sequence has computed is in full blocks."""


class NoStates:
    """Of models that keep nothing but keys and values."""

    def reset(self) -> None: ...

    def reach(self, identities: list[Identity]) -> int:
        return len(identities)

    def begin(self, sequence: Sequence, prefix: Prefix, changes: SeatChanges) -> None: ...

    def settle(self, sequence: Sequence, changes: SeatChanges) -> None: ...
