"""Fair shares between users: virtual token counters, and preemption that keeps them.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588): every user has a
counter of the service that they have received, divided by their weight, and the user with the smallest counter is
admitted next. A user who begins to wait is lifted to the least counter of those who wait, so that idling earns no
credit; where nobody else waits all begin anew, so that nobody pays for what others did not want. Nobody's share is
reserved: a user alone gets the whole machine.

The paper admits fairly but never takes back: who fills all seats first keeps them for as long as the answers take.
Here a waiting user who is owed a seat gets it from the most over-served user, in one of two cases:

- the one holds fewer seats than their share of those in use, and the other more (so a newcomer need not wait);
- the other has received more than `QUANTUM` beyond the one (so long answers do not unbalance the shares).

The newest sequence of the over-served user goes, and resumes later from its blocks in the prefix cache. It cannot
thrash. The first case moves seats towards the shares and never past them, the second needs a quantum of service
between two exchanges, a sequence that has begun to compute keeps its seat for `MIN_TURN` new tokens, and where
blocks are so scarce that what it computed would be lost, the exchange waits until useful work has paid for it
(recomputation.py).

**The bound.** While two users both wait, and whoever is behind has a next sequence that would fit if the other
gave way, their service per weight drifts apart by at most `2 * (QUANTUM + (MIN_TURN + 2) * step + price * loss /
SHARE) / weight`, where `step` is the most service that one step can give, `weight` the lesser of the two weights,
`price` that of an output token, and `loss` the most tokens that one sequence loses by giving way: 0 where blocks
are plenty. A quantum is let pass, then no step goes by without a seat changing hands, unless all seats of the
over-served user are in their first `MIN_TURN` tokens, or until the tokens that are computed meanwhile have earned
the loss. Where the next sequence would not fit even then, because third users hold the blocks by right, there is
no bound on the drift, for no seat of the other's would help: only one on the wait (passing.py). Tests hold random
workloads to both.

**Classes.** Users of the class `low` get what the others leave: a seat only while nobody else waits for one, and
they give it up at once to whoever else comes; and, all of them together, less than a tenth of the engine's time
while others have work (leftovers.py). So that they never starve, a low user who has had less than a quantum for
`LOW_SECONDS` is owed one: one user at a time, who waited longest first, as soon as the low users' part of the time
has paid for it, has one sequence that goes before everybody until they have had it. With `n` low users who wait,
and a quantum that takes `q` seconds of the engine's time (what was lost with the seat computed again) and `d`
seconds until it is had, each gets one within `LOW_SECONDS + (n + 1) * max(q / LOW_SHARE, d)` seconds of steps, the
time that its sequence waits for blocks aside. Users of the class `high` begin a quantum ahead: they go first among
those whose shares are equal, and get no larger share for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator

from scheduler.core.policy import Work
from scheduler.core.ranked import Rank, Ranked
from scheduler.core.sequence import Sequence, Status
from scheduler.core.step import num_attended
from scheduler.features.accounts import QUANTUM, Account, Standings, Turn, within_user
from scheduler.features.leftovers import Leftovers
from scheduler.features.prices import Prices
from scheduler.features.priority_class import PriorityClass
from scheduler.features.recomputation import RecomputationCredit
from scheduler.features.step_cost import StepCost

LOW_SECONDS = 30.0
"""A user of the class `low` who has had less than a quantum for so long is owed one."""

_DUE, _USUAL, _LEFTOVERS = range(3)
"""Lanes: who goes before whom, whatever their counters say."""


class FairShare:
    """The default policy: service in proportion to the users' weights. However many users there are, what a step
    does takes O(log users) for each sequence in it."""

    def __init__(
        self, prices: Prices, clock: Callable[[], float] = time.monotonic, leftovers: Leftovers | None = None
    ) -> None:
        self._prices = prices
        self._clock = clock
        self._leftovers = Leftovers(StepCost()) if leftovers is None else leftovers
        self._accounts: dict[str, Account] = {}
        self._num_waiting = self._num_running = 0
        self._usual, self._low = Standings(), Standings()
        self._hungry: Ranked[Account] = Ranked()
        """Low users who wait or run, whose last quantum is longest ago first."""
        self._due: Account | None = None
        self._passed: list[Account] = []
        self._credit = RecomputationCredit()

    # Who comes and goes ---------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        user, request = sequence.request.user, sequence.request
        account = self._accounts.setdefault(user, Account(user))
        if account.is_low != (PriorityClass.of(request) > 0):
            self._standings(account).drop(account)
            self._is_gone(account)
        account.weight = request.weight
        account.max_running = request.max_running
        account.priority_class = PriorityClass.of(request)
        if account.is_low and account not in self._hungry:
            self._is_fed(account)
        self._enqueue(account, sequence)

    def unseat(self, sequence: Sequence, loss: int | None = None) -> None:
        account = self._of(sequence)
        del account.running[sequence.key]
        self._num_running -= 1
        if loss is not None and not account.is_low:
            self._credit.stake(sequence, loss)
        self._enqueue(account, sequence)

    def _enqueue(self, account: Account, sequence: Sequence) -> None:
        was_backlogged = account.is_backlogged
        account.waiting.push(sequence)
        self._num_waiting += 1
        if account.is_backlogged and not was_backlogged:
            self._lift(account)
        self._standings(account).refresh(account)

    def _lift(self, account: Account) -> None:
        """A user who did not wait until now gets no credit for the time in which they did not."""
        standings = self._standings(account)
        if standings.is_backlogged:
            account.counter = max(account.counter, standings.least_counter)
            return
        account.counter = 0.0
        for gone in standings.level():
            if gone is not account:
                del self._accounts[gone.user]

    def withdraw(self, sequence: Sequence) -> None:
        self._credit.release(sequence)
        self._dequeue(sequence)

    def seat(self, sequence: Sequence) -> None:
        self._credit.settle(sequence)
        self._of(sequence).running[sequence.key] = Turn(sequence, sequence.num_computed_tokens)
        self._num_running += 1
        self._dequeue(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        account.waiting.remove(sequence)
        self._num_waiting -= 1
        self._settle(account)

    def leave(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        was_backlogged = account.is_backlogged
        del account.running[sequence.key]
        self._num_running -= 1
        if account.is_backlogged and not was_backlogged:  # held back by their own limit until now
            self._lift(account)
        self._settle(account)

    def _settle(self, account: Account) -> None:
        """One sequence of a user's has gone or got its seat. Of a user who has left, only a counter ahead of what
        a newcomer gets is worth remembering."""
        standings = self._standings(account)
        standings.refresh(account)
        if account.is_active:
            return
        self._is_gone(account)
        if account.counter <= standings.least_counter or not standings.is_backlogged:
            standings.drop(account)
            del self._accounts[account.user]

    def _is_gone(self, account: Account) -> None:
        """A low user has left, or is one no more."""
        self._hungry.discard(account)
        if account is self._due:
            self._due = None

    def charge(self, works: Iterable[Work]) -> None:
        works = list(works)
        if self._low.is_active and self._usual.is_active:
            self._charge_time(works)
        num_useful = 0
        served: dict[Account, float] = {}
        for work in works:
            account = self._of(work.sequence)
            num_new = work.prompt + work.output
            account.running[work.sequence.key].num_new_tokens += num_new
            num_useful += num_new
            served[account] = served.get(account, 0.0) + self._prices.service(work)
        for account, service in served.items():
            account.counter += service / account.weight
            self._standings(account).refresh(account)
            if account.is_low:
                self._feed(account, service)
        self._credit.earn(num_useful)

    def _charge_time(self, works: list[Work]) -> None:
        """What low users took of a step's time. One that others could not use at all is nobody's."""
        low = [work for work in works if self._of(work.sequence).is_low]
        if len(low) < len(works) or any(work.sequence is self._due_sequence for work in low):
            self._leftovers.settle(_extent(works), _extent(low), self._seats_held(), 2 * QUANTUM)

    def _seats_held(self) -> float:
        """The part of all seats that low users hold while others wait for one: that of who is due."""
        if self._due is None or not self._due.running or not self._usual.is_backlogged:
            return 0.0
        return 1 / self._num_running

    def _feed(self, account: Account, service: float) -> None:
        account.fed += service
        if account.fed >= QUANTUM:
            self._is_fed(account)

    def _is_fed(self, account: Account) -> None:
        """A low user has had a quantum, or begins to wait for one."""
        account.fed = 0.0
        self._hungry.push((self._clock(),), account)
        if account is self._due:
            self._due = None

    # Whose turn it is -----------------------------------------------------------------------------------

    def begin(self) -> None:
        for account in self._passed:
            account.is_passed = False
            if self._accounts.get(account.user) is account:
                self._standings(account).refresh(account)
        self._passed.clear()
        hungry = self._longest_hungry
        if self._due is None and hungry is not None and self._leftovers.affords(QUANTUM):
            self._due, hungry.fed = hungry, 0.0

    @property
    def _longest_hungry(self) -> Account | None:
        """The low user who is owed a quantum, if one is."""
        first = self._hungry.first
        return first[1] if first is not None and self._clock() - first[0][0] >= LOW_SECONDS else None

    def peek(self) -> Sequence | None:
        due = self._due_sequence
        if due is not None and due.status is Status.WAITING and not self._of(due).is_passed:
            return due
        account = self._usual.candidate or self._low.candidate
        return account.waiting.first if account is not None else None

    def pass_over(self, sequence: Sequence) -> None:
        account = self._of(sequence)
        account.is_passed = True
        self._passed.append(account)
        self._standings(account).refresh(account)

    @property
    def _due_sequence(self) -> Sequence | None:
        """The one with which a low user gets the quantum that they are owed."""
        due = self._due
        if due is None:
            return None
        return next(iter(due.running.values())).sequence if due.running else due.waiting.first

    def rank(self, sequence: Sequence) -> Rank:
        return (self._lane(sequence), self._of(sequence).standing, *within_user(sequence))

    def is_newcomer(self, sequence: Sequence) -> bool:
        account = self._of(sequence)
        return len(account.running) == 1 and not account.waiting and not account.is_low

    def gets_leftovers(self, sequence: Sequence) -> bool:
        return self._lane(sequence) is _LEFTOVERS

    def hold_back(self, decoding: list[Sequence]) -> tuple[list[Sequence], int]:
        if not self._low.is_active:
            return decoding, 0
        beside = self._usual.is_active
        if beside and self._due is None and self._longest_hungry is not None:
            decoding = [sequence for sequence in decoding if not self.gets_leftovers(sequence)]
            return decoding, 0  # it is saved up for who is owed a quantum
        return self._leftovers.hold_back(decoding, self.gets_leftovers, beside=beside)

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=self.rank)

    def yielding(
        self, candidate: Sequence, running: Collection[Sequence], loss: Callable[[Sequence], int]
    ) -> Iterator[Sequence]:
        lane = self._lane(candidate)
        poorer = self._of(candidate)
        holders = sorted(
            {account for sequence in running if (account := self._of(sequence)) is not poorer},
            key=lambda account: (account.standing, account.user),
            reverse=True,
        )
        if lane is not _LEFTOVERS:  # whatever they have computed: it is theirs to lose
            for holder in holders:
                yield from (turn.sequence for turn in _newest(holder) if self.gets_leftovers(turn.sequence))
        lost = 0
        for turn in self._owing(poorer, lane, holders, len(running)):
            if turn.may_end and self._credit.affords(cost := loss(turn.sequence), lost):
                lost += cost
                yield turn.sequence

    def _owing(self, poorer: Account, lane: int, holders: list[Account], num_running: int) -> Iterator[Turn]:
        """The turns, not of leftovers, of those who owe a waiting user a seat, who owes most and came last first;
        or of leftovers, of low users among themselves."""
        if lane is _DUE:
            yield from (turn for holder in holders if not holder.is_low for turn in _newest(holder))
            return
        peers = [holder for holder in holders if holder.is_low == poorer.is_low]
        if poorer.is_low:
            num_running = sum(len(account.running) for account in (*peers, poorer))
        seats_per_weight = num_running / self._standings(poorer).weight
        below_share = len(poorer.running) < seats_per_weight * poorer.weight
        for richer in peers:
            if richer.standing < poorer.standing:
                return
            lead = (richer.standing - poorer.standing) * min(richer.weight, poorer.weight)
            surplus = len(richer.running) - seats_per_weight * richer.weight
            for turn in _newest(richer):
                if not (lead > QUANTUM or (below_share and surplus >= 1)):
                    break
                if self._lane(turn.sequence) is lane:
                    yield turn
                    surplus -= turn.may_end

    def _lane(self, sequence: Sequence) -> int:
        if not self._of(sequence).is_low:
            return _USUAL
        return _DUE if sequence is self._due_sequence else _LEFTOVERS

    @property
    def gap(self) -> float:
        """How far the counters of those who wait are apart, the low ones aside: service in prompt tokens, per
        weight."""
        return self._usual.gap

    def __len__(self) -> int:
        return self._num_waiting

    def _of(self, sequence: Sequence) -> Account:
        return self._accounts[sequence.request.user]

    def _standings(self, account: Account) -> Standings:
        return self._low if account.is_low else self._usual


def _extent(works: list[Work]) -> tuple[int, int]:
    """How many tokens were computed, and at how many keys they looked."""
    attended = sum(num_attended(work.start, work.num_computed) for work in works)
    return sum(work.num_computed for work in works), attended


def _newest(account: Account) -> Iterator[Turn]:
    """A user's turns, the newest first: a copy, since they end while they are looked at."""
    return reversed(tuple(account.running.values()))
