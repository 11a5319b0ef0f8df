"""When requests end that are not answered yet, and how soon one can be: what would be late is refused at once."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.core.ranked import Ranked
from scheduler.core.request import FinishReason, Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.sequence import Sequence, Status
from scheduler.features.step_cost import StepCost


class DeadlineError(RuntimeError):
    """The request cannot be answered by its deadline; the message says why."""


class Deadlines:
    """The sequences that end at a time of their own, answered or not."""

    def __init__(self) -> None:
        self._ends: Ranked[Sequence] = Ranked()

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.request.deadline is not None:
                self._ends.push((sequence.request.deadline,), sequence)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._ends.discard(sequence)

    def expire(self, scheduler: Scheduler, now: float) -> list[Sequence]:
        """End the sequences whose deadline has passed, and return them. `now` is on the monotonic clock."""
        late: list[Sequence] = []
        while (first := self._ends.first) is not None and first[0][0] <= now:
            sequence = first[1]
            self.forget(sequence)
            if sequence.status is not Status.FINISHED:
                scheduler.finish(sequence, FinishReason.TIMEOUT)
                late.append(sequence)
        return late


def least_seconds(
    request: Request, *, num_cached: int, block_size: int, most_tokens: int, most_gained: int, cost: StepCost
) -> float:
    """Seconds that a new request takes at least, by the model of a step's cost, whatever becomes of all others.

    Nobody's work is counted but its own: others may end, be aborted, or compute a prefix for it. Of its prompt
    what is not cached yet (`num_cached` tokens are) has still to be computed by somebody, in steps of
    `most_tokens`, but for what others may have in a block that is not full. Of its answer what has to come before
    it may end, in steps of which each gives `most_gained` tokens, drafts among them.
    """
    params = request.params
    num_prompt_tokens = max(1, len(request.prompt_token_ids) - num_cached - (block_size - 1))
    seconds = num_prompt_tokens / most_tokens * cost.predict(most_tokens, 0)
    may_stop = params.stop_token_ids or params.stop or not params.ignore_eos
    num_tokens = params.min_tokens if may_stop or params.max_tokens is None else params.max_tokens
    return seconds + max(0.0, num_tokens / most_gained - 1) * cost.predict(1, 0)
