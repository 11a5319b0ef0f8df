"""Steps for newcomers alone: a short prompt of a user who asks for nothing else does not wait for everybody."""

from __future__ import annotations

from scheduler.core.plan import Chunk, Plan
from scheduler.features.sharing_policy import SharingPolicy

EXPRESS_TOKENS = 64
"""Prompt tokens at most that a step computes for newcomers alone."""

EXPRESS_EVERY = 4
"""Steps of all that come between two steps for newcomers alone."""


class Express:
    """Where a step computes newcomers' short prompts alone, their first tokens are out in a fraction of the time
    that a step of all takes, and the others lose little."""

    def __init__(self, policy: SharingPolicy) -> None:
        self._policy = policy
        self._num_steps_since = EXPRESS_EVERY

    def narrow(self, plan: Plan) -> bool:
        """Leave such prompts alone in the plan, if there are any and it is time for them."""
        self._num_steps_since += 1
        if self._num_steps_since <= EXPRESS_EVERY:
            return False
        chunks = self._newcomers(plan)
        if not chunks:
            return False
        plan.chunks = chunks
        self._num_steps_since = 0
        return True

    def _newcomers(self, plan: Plan) -> list[Chunk]:
        seated = {sequence.key for sequence in plan.admitted if self._policy.is_newcomer(sequence)}
        chunks = [chunk for chunk in plan.chunks if chunk.sequence.key in seated and chunk.samples]
        return chunks if sum(chunk.length for chunk in chunks) <= EXPRESS_TOKENS else []
