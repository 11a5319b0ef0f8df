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
between two exchanges, and a sequence that has begun to compute keeps its seat for `MIN_TURN` new tokens.

**The bound.** While two users both wait, their service per weight drifts apart by at most
`2 * (QUANTUM + (MIN_TURN + 2) * step) / weight`, where `step` is the most service that one step can give and
`weight` the lesser of the two weights: a quantum is let pass, then no step goes by without a seat changing hands,
unless all seats of the over-served user are in their first `MIN_TURN` tokens. Tests hold random workloads to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from scheduler.policy import Rank, WaitingQueue, Work
from scheduler.request import Request, Sequence

QUANTUM = 512.0
"""Service, in prompt tokens, that one waiting user may fall behind another before a seat changes hands."""

MIN_TURN = 32
"""New tokens that a sequence may compute before a seat is taken from it."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token counts, in prompt tokens. Output tokens cost a step each; cached ones hardly anything."""

    output: float = 2.0
    cached: float = 0.05

    def service(self, work: Work) -> float:
        return work.prompt + self.cached * work.cached + self.output * work.output


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
    waiting: WaitingQueue = field(default_factory=lambda: WaitingQueue(_within_user))
    running: dict[tuple[str, int], _Turn] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return len(self.waiting) > 0 or len(self.running) > 0

    @property
    def is_backlogged(self) -> bool:
        """Whether a free seat would be of use to them."""
        return len(self.waiting) > 0 and (self.max_running is None or len(self.running) < self.max_running)


class FairShare:
    """The default policy: service in proportion to the users' weights. Takes O(users) where it looks at all."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._accounts: dict[str, _Account] = {}
        self._num_waiting = 0
        self._last_waiting = _Account()
        """The user who was the last to have somebody waiting."""

    # Who comes and goes ---------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        account = self._accounts.setdefault(sequence.request.user, _Account())
        account.weight = sequence.request.weight
        account.max_running = sequence.request.max_running
        self._enqueue(account, sequence)

    def unseat(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        del account.running[sequence.key]
        self._enqueue(account, sequence)

    def _enqueue(self, account: _Account, sequence: Sequence) -> None:
        was_backlogged = account.is_backlogged
        account.waiting.push(sequence)
        self._num_waiting += 1
        if not was_backlogged:
            self._lift(account)

    def _lift(self, account: _Account) -> None:
        """A user who did not wait until now gets no credit for the time in which they did not."""
        account.counter = max(account.counter, self._least_counter(other_than=account))

    def _least_counter(self, other_than: _Account | None = None) -> float:
        counters = (account.counter for account in self._backlogged() if account is not other_than)
        return min(counters, default=self._last_waiting.counter)

    def withdraw(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        account.waiting.remove(sequence)
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self._last_waiting = account
        self._forget_if_gone(sequence.request.user, account)

    def seat(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        account.running[sequence.key] = _Turn(sequence, sequence.num_computed_tokens)
        self.withdraw(sequence)

    def leave(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        was_backlogged = account.is_backlogged
        del account.running[sequence.key]
        if account.is_backlogged and not was_backlogged:  # held back by their own limit until now
            self._lift(account)
        self._forget_if_gone(sequence.request.user, account)

    def _forget_if_gone(self, user: str, account: _Account) -> None:
        """Of a user who has left, only a counter ahead of what a newcomer gets is worth remembering."""
        if not account.is_active and account.counter <= self._least_counter():
            del self._accounts[user]

    def charge(self, work: Work) -> None:
        account = self._of(work.sequence)
        account.counter += self._prices.service(work) / account.weight
        account.running[work.sequence.key].num_new_tokens += work.prompt + work.output

    # Whose turn it is -----------------------------------------------------------------------------------

    def peek(self) -> Sequence | None:
        # Of two who are owed the same, the one with fewer seats: the newcomer.
        account = min(
            self._backlogged(),
            key=lambda account: (account.counter, len(account.running) / account.weight),
            default=None,
        )
        return account.waiting.first if account is not None else None

    def rank(self, sequence: Sequence) -> Rank:
        return (self._of(sequence).counter, *_within_user(sequence))

    def is_newcomer(self, sequence: Sequence) -> bool:
        account = self._of(sequence)
        return len(account.running) == 1 and not account.waiting

    def tokens_ahead(self, request: Request) -> int:
        account = self._accounts.get(request.user)
        return account.waiting.num_tokens if account is not None else 0

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=self.rank)

    def yielding(self, candidate: Sequence, running: Collection[Sequence]) -> Iterator[Sequence]:
        poorer = self._of(candidate)
        active = [account for account in self._accounts.values() if account.is_active]
        seats_per_weight = len(running) / sum(account.weight for account in active)
        below_share = len(poorer.running) < seats_per_weight * poorer.weight
        for richer in sorted(active, key=lambda account: account.counter, reverse=True):
            if richer is poorer:
                continue
            if richer.counter < poorer.counter:
                break
            lead = (richer.counter - poorer.counter) * min(richer.weight, poorer.weight)
            surplus = len(richer.running) - seats_per_weight * richer.weight
            for turn in reversed(richer.running.values()):
                if not (lead > QUANTUM or (below_share and surplus >= 1)):
                    break
                if turn.may_end:
                    yield turn.sequence
                    surplus -= 1

    @property
    def gap(self) -> float:
        """How far the counters of those who wait are apart: service in prompt tokens, per weight."""
        counters = [account.counter for account in self._backlogged()]
        return max(counters) - min(counters) if counters else 0.0

    def __len__(self) -> int:
        return self._num_waiting

    def _of(self, sequence: Sequence) -> _Account:
        return self._accounts[sequence.request.user]

    def _backlogged(self) -> Iterator[_Account]:
        return (account for account in self._accounts.values() if account.is_backlogged)
