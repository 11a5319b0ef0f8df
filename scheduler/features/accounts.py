"""What is known of each user: the service they had, who of theirs waits and who runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler.core.ranked import Rank, Ranked
from scheduler.core.sequence import Sequence
from scheduler.features.priority_class import PriorityClass
from scheduler.features.waiting_queue import WaitingQueue

QUANTUM = 512.0
"""Service, in prompt tokens, that one waiting user may fall behind another before a seat changes hands."""

MIN_TURN = 32
"""New tokens that a sequence may compute before a seat is taken from it."""


@dataclass(slots=True)
class Turn:
    """A sequence's time on its seat."""

    sequence: Sequence
    computed_before: int
    num_new_tokens: int = 0

    @property
    def may_end(self) -> bool:
        """Whether the seat may be taken for the sake of fair shares."""
        untouched = self.sequence.num_computed_tokens == self.computed_before
        return untouched or self.num_new_tokens >= MIN_TURN


def within_user(sequence: Sequence) -> Rank:
    """The order among one user's sequences."""
    return (sequence.request.priority, sequence.arrival)


@dataclass(slots=True, eq=False)
class Account:
    """One user: their counter, who of theirs waits, and who runs (newest last)."""

    user: str
    counter: float = 0.0
    """Service per weight."""
    weight: float = 1.0
    max_running: int | None = None
    priority_class: PriorityClass = PriorityClass.NORMAL
    fed: float = 0.0
    """A low user's service since their last quantum, or since one is due."""
    is_passed: bool = False
    """Whether the first of those who wait does not fit into the plan that is made."""
    counted_weight: float = 0.0
    """What `Standings` has counted."""
    waiting: WaitingQueue = field(default_factory=lambda: WaitingQueue(within_user))
    running: dict[tuple[str, int], Turn] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return len(self.waiting) > 0 or len(self.running) > 0

    @property
    def is_backlogged(self) -> bool:
        """Whether a free seat would be of use to them."""
        return len(self.waiting) > 0 and (self.max_running is None or len(self.running) < self.max_running)

    @property
    def is_low(self) -> bool:
        return self.priority_class is PriorityClass.LOW

    @property
    def standing(self) -> float:
        """The counter, with the head start that the class gives."""
        return self.counter - (QUANTUM / self.weight if self.priority_class is PriorityClass.HIGH else 0.0)


class Standings:
    """The accounts of one kind, low users or all others, in the orders in which they are asked for. Whatever has
    changed in an account, `refresh` takes O(log accounts)."""

    def __init__(self) -> None:
        self._accounts: dict[Account, None] = {}
        self._candidates: Ranked[Account] = Ranked()
        self._least: Ranked[Account] = Ranked()
        self._most: Ranked[Account] = Ranked()
        self._num_active = 0
        self.weight = 0.0
        """Of all who wait or run."""

    @property
    def is_active(self) -> bool:
        """Whether anybody waits or runs."""
        return self._num_active > 0

    @property
    def is_backlogged(self) -> bool:
        """Whether a free seat would be of use to anybody."""
        return len(self._least) > 0

    @property
    def candidate(self) -> Account | None:
        """Whose turn it is. Of two who are owed the same, the one with fewer seats: the newcomer; and of two
        newcomers who came first."""
        first = self._candidates.first
        return None if first is None else first[1]

    @property
    def least_counter(self) -> float:
        """Of those who are backlogged; 0 if nobody is."""
        first = self._least.first
        return 0.0 if first is None else first[1].counter

    @property
    def gap(self) -> float:
        """How far the counters of those who are backlogged are apart."""
        first = self._most.first
        return 0.0 if first is None else first[1].counter - self.least_counter

    def refresh(self, account: Account) -> None:
        """Something of an account has changed, or it is new."""
        self._accounts[account] = None
        self._count(account, account.weight if account.is_active else 0.0)
        if not account.is_backlogged:
            self._least.discard(account)
            self._most.discard(account)
        else:
            self._least.push((account.counter,), account)
            self._most.push((-account.counter,), account)
        first = account.waiting.first
        if first is None or not account.is_backlogged or account.is_passed:
            self._candidates.discard(account)
        else:
            seats = len(account.running) / account.weight
            self._candidates.push((account.standing, seats, first.arrival), account)

    def drop(self, account: Account) -> None:
        """An account is forgotten, or goes to the other kind."""
        if account in self._accounts:
            del self._accounts[account]
            self._count(account, 0.0)
            for ranked in (self._candidates, self._least, self._most):
                ranked.discard(account)

    def _count(self, account: Account, weight: float) -> None:
        self._num_active += (weight > 0) - (account.counted_weight > 0)
        self.weight += weight - account.counted_weight
        account.counted_weight = weight
        if self._num_active == 0:
            self.weight = 0.0  # no rounding error outlasts a quiet moment

    def level(self) -> Iterator[Account]:
        """Somebody begins to wait, and nobody else does: what was served until now was owed to nobody, and all
        begin at 0. Takes out, and gives back, those who are gone."""
        for account in list(self._accounts):
            if account.is_active:
                account.counter = 0.0
            else:
                self.drop(account)
                yield account
