"""The sequences of one request that wait for its first: their prompt is the same, and is computed once."""

from __future__ import annotations

from scheduler.core.policy import Policy
from scheduler.core.sequence import Sequence, Status


class Siblings:
    """The first of a request's sequences is queued at once. The others follow when the prompt is in the prefix
    cache, or when the first has ended without it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._following: dict[str, list[Sequence]] = {}  # by request id
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def wait(self, first: Sequence, others: list[Sequence]) -> None:
        """They follow `first`, which is queued."""
        for sequence in others:
            sequence.status = Status.FOLLOWING
        self._following[first.request.request_id] = others
        self._count += len(others)

    def follow(self, first: Sequence) -> None:
        """Queue those that wait for it, if there are any."""
        followers = self._following.pop(first.request.request_id, [])
        self._count -= len(followers)
        for sequence in followers:
            sequence.status = Status.WAITING
            self._policy.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        """One of those that wait has ended."""
        self._following[sequence.request.request_id].remove(sequence)
        self._count -= 1
