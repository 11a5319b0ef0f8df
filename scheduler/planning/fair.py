"""Fair shares between users: virtual token counters, and preemption that keeps them.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588): every user has a
counter of the service that they have received, divided by their weight, and the user with the smallest counter is
admitted next. A user who comes back after a while is lifted to the least counter of those who wait, so that idling
earns no credit. Nobody's share is reserved: a user alone gets the whole machine.

The paper admits fairly but never takes back: who fills all seats first keeps them for as long as the answers take.
Here a waiting user who is owed a seat gets it from the most over-served user, in one of two cases:

- the one holds fewer seats than their share of those in use, and the other more (so a newcomer need not wait);
- the other has received more than `QUANTUM` beyond the one (so long answers do not unbalance the shares).

The newest sequence of the over-served user goes, and resumes later from its blocks in the prefix cache. It cannot
thrash. The first case moves seats towards the shares and never past them, the second needs a quantum of service
between two exchanges, a sequence that has begun to compute keeps its seat for `MIN_TURN` new tokens, and where
blocks are so scarce that what it computed would be lost, the exchange waits until useful work has paid for it
(recomputation.py).

**The bound.** While two users both wait, their service per weight drifts apart by at most `2 * (QUANTUM +
(MIN_TURN + 2) * step + price * loss / SHARE) / weight`, where `step` is the most service that one step can give,
`weight` the lesser of the two weights, `price` that of an output token, and `loss` the most tokens that one
sequence loses by giving way: 0 where blocks are plenty. A quantum is let pass, then no step goes by without a seat
changing hands, unless all seats of the over-served user are in their first `MIN_TURN` tokens, or until the tokens
that are computed meanwhile have earned the loss. Tests hold random workloads to it.

**Classes.** Users of the class `low` get what the others leave: a seat only while nobody else waits for one, and
they give it up to whoever else comes; and a small part of each step while others are there (turns.py). So that
they never starve, a low user who has had less than a quantum for `LOW_SECONDS` comes before everybody until they
have had one. Users of the class `high` begin a quantum ahead: they go first among those whose shares are equal,
and get no larger share for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from scheduler.planning.policy import WaitingQueue, Work
from scheduler.planning.ranked import Rank
from scheduler.planning.recomputation import RecomputationCredit
from scheduler.request import PriorityClass, Request, Sequence

QUANTUM = 512.0
"""Service, in prompt tokens, that one waiting user may fall behind another before a seat changes hands."""

MIN_TURN = 32
"""New tokens that a sequence may compute before a seat is taken from it."""

LOW_SECONDS = 30.0
"""A user of the class `low` gets a quantum at least this often."""

_DUE, _USUAL, _LEFTOVERS = range(3)
"""Lanes: who goes before whom, whatever their counters say."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token counts, in prompt tokens. Output tokens cost a step each; cached ones hardly anything."""

    output: float = 2.0
    cached: float = 0.05

    def service(self, work: Work) -> float:
        """A wrong guess costs what it takes to compute it."""
        return work.prompt + self.cached * work.cached + self.output * work.output + work.refused


@dataclass(slots=True)
class _Turn:
    """A sequence's time on its seat."""

    sequence: Sequence
    computed_before: int
    num_new_tokens: int = 0

    @property
    def may_end(self) -> bool:
        untouched = self.sequence.num_computed_tokens == self.computed_before
        return untouched or self.num_new_tokens >= MIN_TURN


def _within_user(sequence: Sequence) -> Rank:
    return (sequence.request.priority, sequence.arrival)


@dataclass(slots=True)
class _Account:
    """One user: their counter, who of theirs waits, and who runs (newest last)."""

    counter: float = 0.0
    weight: float = 1.0
    max_running: int | None = None
    priority_class: PriorityClass = PriorityClass.NORMAL
    fed_at: float = 0.0
    """When a low user last had had a quantum, or had nothing to wait for."""
    fed: float = 0.0
    """Service since then, or since it is due."""
    is_due: bool = False
    """Whether it has gone hungry for `LOW_SECONDS`."""
    waiting: WaitingQueue = field(default_factory=lambda: WaitingQueue(_within_user))
    running: dict[tuple[str, int], _Turn] = field(default_factory=dict)

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


class FairShare:
    """The default policy: service in proportion to the users' weights. Takes O(users) where it looks at all."""

    def __init__(self, prices: Prices, clock: Callable[[], float] = time.monotonic) -> None:
        self._prices = prices
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._num_waiting = 0
        self._last_waiting = {False: _Account(), True: _Account()}
        """Who was the last to have somebody waiting, of the low users (True) and of the others."""
        self._credit = RecomputationCredit()

    # Who comes and goes ---------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        account = self._accounts.setdefault(sequence.request.user, _Account())
        account.weight = sequence.request.weight
        account.max_running = sequence.request.max_running
        account.priority_class = sequence.request.priority_class
        if not account.is_active:
            account.fed_at, account.fed, account.is_due = self._clock(), 0.0, False
        self._enqueue(account, sequence)

    def unseat(self, sequence: Sequence, loss: int | None = None) -> None:
        account = self._of(sequence)
        del account.running[sequence.key]
        if loss is not None:
            self._credit.stake(sequence, loss)
        self._enqueue(account, sequence)

    def _enqueue(self, account: _Account, sequence: Sequence) -> None:
        was_backlogged = account.is_backlogged
        account.waiting.push(sequence)
        self._num_waiting += 1
        if not was_backlogged:
            self._lift(account)

    def _lift(self, account: _Account) -> None:
        """A user who did not wait until now gets no credit for the time in which they did not."""
        account.counter = max(account.counter, self._least_counter(account))

    def _least_counter(self, account: _Account) -> float:
        """The least counter of the others who wait, low users and all others by themselves."""
        others = (other for other in self._backlogged() if other is not account and other.is_low == account.is_low)
        return min((other.counter for other in others), default=self._last_waiting[account.is_low].counter)

    def withdraw(self, sequence: Sequence) -> None:
        self._credit.release(sequence)
        self._dequeue(sequence)

    def seat(self, sequence: Sequence) -> None:
        self._credit.settle(sequence)
        self._of(sequence).running[sequence.key] = _Turn(sequence, sequence.num_computed_tokens)
        self._dequeue(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        account.waiting.remove(sequence)
        self._num_waiting -= 1
        self._last_waiting[account.is_low] = account
        self._forget_if_gone(sequence.request.user, account)

    def leave(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        was_backlogged = account.is_backlogged
        del account.running[sequence.key]
        if account.is_backlogged and not was_backlogged:  # held back by their own limit until now
            self._lift(account)
        self._forget_if_gone(sequence.request.user, account)

    def _forget_if_gone(self, user: str, account: _Account) -> None:
        """Of a user who has left, only a counter ahead of what a newcomer gets is worth remembering."""
        if not account.is_active and account.counter <= self._least_counter(account):
            del self._accounts[user]

    def charge(self, works: Iterable[Work]) -> None:
        num_useful = 0
        for work in works:
            account = self._accounts[work.sequence.request.user]
            service = self._prices.service(work)
            account.counter += service / account.weight
            num_new = work.prompt + work.output
            account.running[work.sequence.key].num_new_tokens += num_new
            num_useful += num_new
            if account.is_low:
                account.fed += service
                if account.fed >= QUANTUM:
                    account.fed_at, account.fed, account.is_due = self._clock(), 0.0, False
        self._credit.earn(num_useful)

    # Whose turn it is -----------------------------------------------------------------------------------

    def peek(self) -> Sequence | None:
        # Of two who are owed the same, the one with fewer seats: the newcomer.
        account = min(
            self._backlogged(),
            key=lambda account: (self._lane(account), account.standing, len(account.running) / account.weight),
            default=None,
        )
        return account.waiting.first if account is not None else None

    def rank(self, sequence: Sequence) -> Rank:
        account = self._of(sequence)
        return (self._lane(account), account.standing, *_within_user(sequence))

    def is_newcomer(self, sequence: Sequence) -> bool:
        account = self._of(sequence)
        return len(account.running) == 1 and not account.waiting and self._lane(account) is not _LEFTOVERS

    def gets_leftovers(self, sequence: Sequence) -> bool:
        return self._lane(self._of(sequence)) is _LEFTOVERS

    def tokens_ahead(self, request: Request) -> int:
        account = self._accounts.get(request.user)
        return account.waiting.num_tokens if account is not None else 0

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=self.rank)

    def yielding(
        self, candidate: Sequence, running: Collection[Sequence], loss: Callable[[Sequence], int]
    ) -> Iterator[Sequence]:
        lost = 0
        for turn in self._owing(self._of(candidate), len(running)):
            if turn.may_end and self._credit.affords(cost := loss(turn.sequence), lost):
                lost += cost
                yield turn.sequence

    def _owing(self, poorer: _Account, num_running: int) -> Iterator[_Turn]:
        """The turns of those who owe a waiting user a seat, who owes most and came last first."""
        lane = self._lane(poorer)
        if lane is _LEFTOVERS:
            return
        active = sorted(
            (account for account in self._accounts.values() if account.is_active and account is not poorer),
            key=lambda account: (self._lane(account), account.standing),
            reverse=True,
        )
        seats_per_weight = num_running / sum(account.weight for account in (*active, poorer))
        below_share = len(poorer.running) < seats_per_weight * poorer.weight
        for richer in active:
            turns = reversed(tuple(richer.running.values()))
            if self._lane(richer) is _LEFTOVERS or lane is _DUE:
                yield from turns
                continue
            if richer.standing < poorer.standing or self._lane(richer) is _DUE:
                break
            lead = (richer.standing - poorer.standing) * min(richer.weight, poorer.weight)
            surplus = len(richer.running) - seats_per_weight * richer.weight
            for turn in turns:
                if not (lead > QUANTUM or (below_share and surplus >= 1)):
                    break
                yield turn
                surplus -= turn.may_end

    def _lane(self, account: _Account) -> int:
        if not account.is_low:
            return _USUAL
        if not account.is_due and self._clock() - account.fed_at >= LOW_SECONDS:
            account.is_due, account.fed = True, 0.0
        return _DUE if account.is_due else _LEFTOVERS

    @property
    def gap(self) -> float:
        """How far the counters of those who wait are apart, the low ones aside: service in prompt tokens, per
        weight."""
        counters = [account.counter for account in self._backlogged() if not account.is_low]
        return max(counters) - min(counters) if counters else 0.0

    def __len__(self) -> int:
        return self._num_waiting

    def _of(self, sequence: Sequence) -> _Account:
        return self._accounts[sequence.request.user]

    def _backlogged(self) -> Iterator[_Account]:
        return (account for account in self._accounts.values() if account.is_backlogged)
