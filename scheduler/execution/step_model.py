"""What models may be to those who run steps, beyond what each is (core/model.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from scheduler.core.step import SinkShift, StateMove


@dataclass(frozen=True, slots=True)
class OwnState:
    """What a model keeps for each sequence beside the block pool, in bytes."""

    per_token: int
    per_seat: int
    """However long the sequence is."""
    per_slot: int = 0
    """For a state that is put aside; 0: none can be."""


@runtime_checkable
class StatefulModel(Protocol):
    """One that keeps something for each seat besides what is in the pool."""

    def vacate(self, seat: int) -> None:
        """Whoever had this seat has left it."""


@runtime_checkable
class ResumableModel(StatefulModel, Protocol):
    """One whose states can be put aside, so that other sequences begin with them."""

    def save_state(self, move: StateMove) -> None:
        """Put a copy of a seat's state into a slot: as it is, or as it was before the last step."""

    def load_state(self, move: StateMove) -> None:
        """Give a seat the state in a slot."""


@runtime_checkable
class ShiftableModel(Protocol):
    """One that can drop tokens from the middle of a context."""

    def shift_sink(self, shift: SinkShift) -> None:
        """Turn a block's keys on by some positions, into another block."""
