"""Who is admitted next, and who goes when blocks are short: what the scheduler asks of a policy, and the plainest.

What `carousel serve` takes by default, fair shares between users, is in fair.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from scheduler.core.ranked import Rank, Ranked
from scheduler.core.sequence import Sequence


class Work(NamedTuple):
    """What one step did for one sequence, in tokens. What is computed again after a preemption is no service: it
    is not the user's doing."""

    sequence: Sequence
    prompt: int = 0
    cached: int = 0
    """Prompt tokens that the prefix cache spared."""
    output: int = 0
    recomputed: int = 0
    """Tokens that were computed before; they are no service."""
    refused: int = 0
    """Tokens that were guessed for it, and wrongly."""
    start: int = 0
    """How many keys there were before the tokens that the step computed."""
    num_computed: int = 0
    """Tokens that the step computed of it, whatever for."""


class Policy(Protocol):
    """The queue of waiting sequences, and the order among all. No method may take O(queue length)."""

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""

    def withdraw(self, sequence: Sequence) -> None:
        """A waiting sequence has ended: aborted, or out of time."""

    def seat(self, sequence: Sequence) -> None:
        """A waiting sequence got a seat."""

    def unseat(self, sequence: Sequence, loss: int | None = None) -> None:
        """A running sequence lost its seat, and waits to be resumed. `loss`: it gave way to another, and so many
        of its tokens may have to be computed again; None: it lost it for want of blocks."""

    def leave(self, sequence: Sequence) -> None:
        """A running sequence has ended."""

    def charge(self, works: Iterable[Work]) -> None:
        """Running sequences were served by a step."""

    def begin(self) -> None:
        """A new plan is begun: nobody is passed over any more."""

    def peek(self) -> Sequence | None:
        """The sequence to admit next, or None if nobody may be admitted."""

    def pass_over(self, sequence: Sequence) -> None:
        """What `peek` named does not fit into this plan. The order within a user stays: until `begin`, `peek`
        names none of that user's."""

    def rank(self, sequence: Sequence) -> Rank:
        """In which order prompts take what a step's token budget leaves, whether running or still to be seated."""

    def gets_leftovers(self, sequence: Sequence) -> bool:
        """Whether a sequence only gets what the others leave."""

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """The sequence among `running` (never empty) to preempt when running sequences are out of blocks."""

    def __len__(self) -> int:
        """How many wait."""


class FirstComeFirstServed:
    """Admit in order of arrival; preempt the latest arrival, which is then the first to resume."""

    def __init__(self) -> None:
        self._waiting: Ranked[Sequence] = Ranked()

    def add(self, sequence: Sequence) -> None:
        self._waiting.push(self.rank(sequence), sequence)

    def withdraw(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def seat(self, sequence: Sequence) -> None:
        self.withdraw(sequence)

    def unseat(self, sequence: Sequence, loss: int | None = None) -> None:
        self.add(sequence)

    def leave(self, sequence: Sequence) -> None: ...
    def charge(self, works: Iterable[Work]) -> None: ...
    def begin(self) -> None: ...

    def peek(self) -> Sequence | None:
        first = self._waiting.first
        return None if first is None else first[1]

    def pass_over(self, sequence: Sequence) -> None: ...

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.arrival,)

    def gets_leftovers(self, sequence: Sequence) -> bool:
        return False

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=self.rank)

    def __len__(self) -> int:
        return len(self._waiting)
