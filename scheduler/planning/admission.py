"""Who gets a seat in a plan, and who gives one up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from scheduler.planning.blocks import Prefix
from scheduler.planning.passing import Passing
from scheduler.planning.plan import PlanBuilder
from scheduler.planning.policy import Policy
from scheduler.planning.seating import Seating
from scheduler.planning.sequence import Sequence, Status


class Admission:
    """Seats those whom the policy names, and unseats those who give way to them or to want of blocks. Who got a
    seat in a plan keeps it in that plan."""

    def __init__(self, policy: Policy, seating: Seating) -> None:
        self._policy = policy
        self._seating = seating
        self._passing = Passing()

    def begin(self) -> None:
        """A new plan is begun."""
        self._policy.begin()
        self._passing.begin()

    def forget(self, sequence: Sequence) -> None:
        """It ends."""
        self._passing.forget(sequence)

    def make_room(self, sequence: Sequence, step: PlanBuilder) -> bool:
        """Give a running sequence the blocks for its next tokens, preempting others if it must; False if it was
        the one to go."""
        while not self._seating.grow(sequence):
            victim = self._policy.victim(self._seating.running.values())
            victim.crowded_out = True
            self.preempt(victim)
            step.drop(victim)
            if victim is sequence:
                return False
        return True

    def seat(self, candidate: Sequence, step: PlanBuilder) -> bool:
        """Admit a waiting sequence, and let those who owe it their seats go. Returns whether others may still be
        admitted: if there is no seat for it they may not, if there are not the blocks they pass it. Its prefix is
        looked up only where what is cached can make a difference."""
        seating = self._seating
        most_spare = seating.most_spare_blocks(candidate)
        if seating.num_free_seats and most_spare >= 0:
            prefix = seating.cached_prefix(candidate)
            if seating.num_spare_blocks(candidate, prefix) >= 0:
                self._take_seat(candidate, prefix, step)
                return True
        loss = seating.losses(candidate)
        owing = self._owing(candidate, step, loss)
        if not owing and not seating.num_free_seats:
            return False
        most_freed = sum(seating.most_freed(sequence, candidate) for sequence in owing)
        going = self._who_goes(candidate, owing) if most_spare + most_freed >= 0 else None
        if going is None:
            self._policy.pass_over(candidate)
            return self._passing.passed(candidate)
        for sequence in going:
            self.preempt(sequence, loss(sequence))
            step.drop(sequence)
            step.num_yielded += 1
        # Looked up anew: what those held who gave way may be part of the prefix now.
        self._take_seat(candidate, seating.cached_prefix(candidate), step)
        return True

    def _owing(self, candidate: Sequence, step: PlanBuilder, loss: Callable[[Sequence], int]) -> list[Sequence]:
        """Who may have to give way to a waiting sequence, the first to go first."""
        owing = self._policy.yielding(candidate, self._seating.running.values(), loss)
        every = itertools.chain(owing, self._passing.loans(candidate))
        return [sequence for sequence in dict.fromkeys(every) if sequence not in step.seated]

    def _who_goes(self, candidate: Sequence, owing: list[Sequence]) -> list[Sequence] | None:
        """Who of those must go so that a waiting sequence has a seat and its blocks; None if all are not
        enough."""
        seating = self._seating
        prefix = seating.cached_prefix(candidate)
        kept = set(prefix.blocks)
        spare = seating.num_spare_blocks(candidate, prefix)
        going: list[Sequence] = []
        for sequence in owing:
            going.append(sequence)
            spare += seating.num_freed(sequence, candidate, kept)
            if spare >= 0:
                return going
        return going if spare >= 0 else None

    def _take_seat(self, candidate: Sequence, prefix: Prefix, step: PlanBuilder) -> None:
        self._seating.admit(candidate, prefix)
        candidate.status = Status.RUNNING
        self._policy.seat(candidate)
        self._passing.seated(candidate)
        step.seated.add(candidate)
        if candidate.num_ever_computed == 0:  # also if it was put out before it had computed anything
            candidate.num_cached_tokens = candidate.num_charged_tokens = candidate.num_computed_tokens
        if candidate.num_preemptions == 0:
            step.admitted.append(candidate)

    def preempt(self, sequence: Sequence, loss: int | None = None) -> None:
        """Take a running sequence's seat and blocks; it waits to go on later. `loss`: as of `Policy.unseat`."""
        self._passing.forget(sequence)
        self._seating.vacate(sequence, comes_back=True)
        self.wait_again(sequence, loss)

    def begin_anew(self, sequence: Sequence) -> None:
        """What a running sequence has computed is of no use any more: it waits to compute it again."""
        self._passing.forget(sequence)
        self._seating.vacate(sequence)
        self.wait_again(sequence)

    def wait_again(self, sequence: Sequence, loss: int | None = None) -> None:
        """It has lost its seat and what it held. `loss`: as of `Policy.unseat`."""
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        sequence.num_computed_tokens = 0
        self._policy.unseat(sequence, loss)
