"""What can be packed for one arithmetic or another, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scheduler.attention import AttentionBackend, LayerSpec
from scheduler.core.model import StepModel
from scheduler.execution.step_model import OwnState
from scheduler.models.products import Mode

Fault = Callable[[AttentionBackend], str | None]
"""Says what is wrong with weights that are packed, if anything is."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights that are ready."""

    nbytes: int
    bits: float
    """Of one weight, on average."""
    model: StepModel
    fault: Fault | None
    """None: they are transformers' modules as they are."""


class Source(Protocol):
    """A model that can be packed. `obstacle` says why its products are torch's, or is None."""

    layers: list[LayerSpec]
    """Those whose keys and values are in the block pool."""
    own: OwnState | None
    """What the model keeps beside it."""
    obstacle: str | None
    shift_obstacle: str
    """Why no tokens can be dropped from the middle of a context; empty: they can."""
    has_stored_weights: bool
    long_after: int | None
    """Tokens of the longest text that is not long, of a model that has other positions for long ones; None: it has
    not, or they are not told apart."""

    def pack(self, mode: Mode) -> Packed: ...
