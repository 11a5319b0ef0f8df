"""Who gets a seat in a plan, and who gives one up."""

from __future__ import annotations

from scheduler.core.blocks import Prefix
from scheduler.core.plan import PlanBuilder
from scheduler.core.policy import Policy
from scheduler.core.seams import Yielding
from scheduler.core.seating import Seating
from scheduler.core.sequence import Sequence, Status


class Admission:
    """Seats those whom the policy names, and unseats those who give way to them or to want of blocks. Who got a
    seat in a plan keeps it in that plan."""

    def __init__(self, policy: Policy, seating: Seating, yielding: Yielding) -> None:
        self._policy = policy
        self._seating = seating
        self._yielding = yielding

    def begin(self) -> None:
        """A new plan is begun."""
        self._policy.begin()
        self._yielding.begin()

    def forget(self, sequence: Sequence) -> None:
        """It ends."""
        self._yielding.forget(sequence)

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
        admitted: if there is no seat for it they may not, if there are not the blocks, those who may pass it."""
        seating = self._seating
        if seating.num_free_seats and (prefix := self._yielding.fits(candidate, seating)) is not None:
            self._take_seat(candidate, prefix, step)
            return True
        owing = self._yielding.owing(candidate, seating, step.seated)
        if not owing and not seating.num_free_seats:
            return False
        going = self._yielding.going(candidate, seating, owing)
        if going is None:
            self._policy.pass_over(candidate)
            return self._yielding.passed(candidate)
        for sequence, loss in going:
            self.preempt(sequence, loss)
            step.drop(sequence)
            step.num_yielded += 1
        # Looked up anew: what those held who gave way may be part of the prefix now.
        self._take_seat(candidate, seating.cached_prefix(candidate), step)
        return True

    def _take_seat(self, candidate: Sequence, prefix: Prefix, step: PlanBuilder) -> None:
        self._seating.admit(candidate, prefix)
        candidate.status = Status.RUNNING
        self._policy.seat(candidate)
        self._yielding.seated(candidate)
        step.seated.add(candidate)
        if candidate.num_ever_computed == 0:  # also if it was put out before it had computed anything
            candidate.num_cached_tokens = candidate.num_charged_tokens = candidate.num_computed_tokens
        if candidate.num_preemptions == 0:
            step.admitted.append(candidate)

    def preempt(self, sequence: Sequence, loss: int | None = None) -> None:
        """Take a running sequence's seat and blocks; it waits to go on later. `loss`: as of `Policy.unseat`."""
        self._yielding.unseated(sequence)
        self._seating.vacate(sequence)
        self.wait_again(sequence, loss)

    def begin_anew(self, sequence: Sequence) -> None:
        """What a running sequence has computed is of no use any more: it waits to compute it again."""
        self._yielding.forget(sequence)
        self._seating.vacate(sequence)
        self.wait_again(sequence)

    def wait_again(self, sequence: Sequence, loss: int | None = None) -> None:
        """It has lost its seat. `loss`: as of `Policy.unseat`."""
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        sequence.num_computed_tokens = 0
        self._policy.unseat(sequence, loss)
