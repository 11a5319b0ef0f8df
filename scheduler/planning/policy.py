"""Who is admitted next, and who goes when blocks are short: what the scheduler asks of a policy, and the plainest.

What `carousel serve` takes by default, fair shares between users, is in fair.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

from scheduler.planning.ranked import Rank, Ranked
from scheduler.planning.sequence import Sequence


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

    def hold_back(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        """Who of `decoding` may decode in this step, and how many tokens it may compute of the prompts of those
        who get what the others leave."""

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """The sequence among `running` (never empty) to preempt when running sequences are out of blocks."""

    def __len__(self) -> int:
        """How many wait."""


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


class FirstComeFirstServed:
    """Admit in order of arrival; preempt the latest arrival, which is then the first to resume."""

    def __init__(self) -> None:
        self._queues: dict[str, WaitingQueue] = {}  # by user: where the first does not fit, others pass it
        self._heads: Ranked[str] = Ranked()  # users, by the rank of their first
        self._passed: list[str] = []
        self._num_waiting = 0

    def add(self, sequence: Sequence) -> None:
        user = sequence.request.user
        self._queues.setdefault(user, WaitingQueue(self.rank)).push(sequence)
        self._num_waiting += 1
        self._refresh(user)

    def withdraw(self, sequence: Sequence) -> None:
        user = sequence.request.user
        self._queues[user].remove(sequence)
        self._num_waiting -= 1
        self._refresh(user)

    def seat(self, sequence: Sequence) -> None:
        self.withdraw(sequence)

    def unseat(self, sequence: Sequence, loss: int | None = None) -> None:
        self.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        pass

    def charge(self, works: Iterable[Work]) -> None:
        pass

    def begin(self) -> None:
        passed, self._passed = self._passed, []
        for user in passed:
            self._refresh(user)

    def peek(self) -> Sequence | None:
        head = self._heads.first
        return None if head is None else self._queues[head[1]].first

    def pass_over(self, sequence: Sequence) -> None:
        self._passed.append(sequence.request.user)
        self._refresh(sequence.request.user)

    def _refresh(self, user: str) -> None:
        first = self._queues[user].first if user in self._queues else None
        if first is None:
            self._queues.pop(user, None)
        if first is None or user in self._passed:
            self._heads.discard(user)
        else:
            self._heads.push(self.rank(first), user)

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.arrival,)

    def gets_leftovers(self, sequence: Sequence) -> bool:
        return False

    def hold_back(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        return decoding, 0

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=self.rank)

    def __len__(self) -> int:
        return self._num_waiting
