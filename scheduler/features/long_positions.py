"""Models whose positions are others, for all of a text, where that is long: what is known of a short text is of no
use to it then, and the other way round (longrope, Ding et al., arXiv 2402.13753)."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.core.request import Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.seams import ENDLESS
from scheduler.core.sequence import Sequence, Status

LONG = "long"


class LongPositions:
    """Tells sequences of more than `after` tokens from shorter ones: neither finds the other's blocks, and who
    comes to be long computes anew."""

    def __init__(self, scheduler: Scheduler, after: int | None) -> None:
        self._scheduler = scheduler
        self._after = ENDLESS if after is None else after

    def kind(self, num_tokens: int) -> tuple[str, ...]:
        """What the blocks of so long a sequence are told apart by."""
        return (LONG,) if num_tokens > self._after else ()

    def num_cached_tokens(self, request: Request) -> int:
        """How many of a new request's tokens need not be computed, as things stand."""
        kind = self.kind(len(request.prompt_token_ids))
        return self._scheduler.seating.num_cached_tokens(request, *kind)

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """They are new in the queue."""
        for sequence in sequences:
            sequence.long_after = self._after
            if sequence.num_tokens > self._after:
                self._lengthen(sequence)

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """A step has been committed for them."""
        for sequence in sequences:
            has_come_to_be_long = not sequence.is_long and sequence.num_tokens > self._after
            if has_come_to_be_long and sequence.status is Status.RUNNING:
                self._lengthen(sequence)
                self._scheduler.admission.begin_anew(sequence)

    def _lengthen(self, sequence: Sequence) -> None:
        sequence.is_long = True
        sequence.root = self._scheduler.seating.root(sequence.request, LONG)
