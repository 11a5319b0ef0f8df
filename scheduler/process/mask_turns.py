"""Whose masks are filled in a step: there are grammars whose masks take longer than a step of everybody's.

All masks together have a share of the engine's time while others have something to do, and of that each user who
is held to a grammar has the same part. Who has used more than their part rests for some steps. So time decides
only who waits; how much work a grammar may be is a count (text/grammar.py), the same on every machine and in any
company.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scheduler.core.plan import Chunk, Plan
from scheduler.core.sequence import Sequence

MASK_SHARE = 0.25
"""Of the time of steps."""

MOST_SAVED = 0.02
"""Seconds of one's part that may be saved up; who never had a mask has them."""

MOST_ALONE = 0.04
"""Seconds of masks in a step in which nobody else has anything: who comes meanwhile waits for it."""


class MaskTurns:
    """Told what each step's masks took, says which sequences rest in the next."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}
        """By user, seconds of their part that are not used; less than none where more was used."""
        self._seconds: dict[str, float] = {}
        """By request, what its last mask took."""
        self._last: dict[tuple[str, int], int] = {}
        """By sequence, the step in which it had its last mask."""
        self._num_steps = 0

    def rest(self, plan: Plan) -> None:
        """Take out of a plan what has to wait. Somebody is always left in it."""
        masked = [place for place, chunk in enumerate(plan.chunks) if _needs_mask(chunk)]
        if not masked:
            return
        self._num_steps += 1
        users = {_user(chunk) for chunk in plan.chunks}
        left = dict.fromkeys(users, MOST_ALONE) if len(users) == 1 else dict(self._left)
        resting = self._resting(plan.chunks, masked, left)
        if len(resting) == len(plan.chunks):  # of all who are over their part, the one who is least
            resting.remove(max(resting, key=lambda place: self._left.get(_user(plan.chunks[place]), MOST_SAVED)))
        plan.chunks = [chunk for place, chunk in enumerate(plan.chunks) if place not in resting]
        for chunk in plan.chunks:
            if _needs_mask(chunk):
                self._last[chunk.sequence.key] = self._num_steps

    def _resting(self, chunks: list[Chunk], masked: Iterable[int], left: dict[str, float]) -> set[int]:
        """Those who have waited longest go first, for as long as there is something `left` of their user's."""
        resting = set()
        for place in sorted(masked, key=lambda place: self._last.get(chunks[place].sequence.key, 0)):
            chunk = chunks[place]
            user, seconds = _user(chunk), self._seconds.get(chunk.sequence.request.request_id, 0.0)
            if left.get(user, MOST_SAVED) < 0:
                resting.add(place)
            left[user] = left.get(user, MOST_SAVED) - seconds * (1 + len(chunk.drafted))
        return resting

    def learn(self, plan: Plan, seconds: Mapping[str, float], duration: float) -> None:
        """A step took so long, and of that each of the masks of these requests so much."""
        used: dict[str, float] = {}
        for chunk in plan.chunks:
            request = chunk.sequence.request
            if request.request_id in seconds and _needs_mask(chunk):
                self._seconds[request.request_id] = seconds[request.request_id]
                used.setdefault(request.user, 0.0)
                used[request.user] += seconds[request.request_id] * (1 + len(chunk.drafted))
        users = self._left.keys() | used.keys()
        part = MASK_SHARE * duration / max(1, len(users))
        for user in users:
            left = self._left.get(user, MOST_SAVED) + part - used.get(user, 0.0)
            if left < MOST_SAVED:
                self._left[user] = left
            else:  # as one who never had a mask
                self._left.pop(user, None)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._seconds.pop(sequence.request.request_id, None)
        self._last.pop(sequence.key, None)


def _needs_mask(chunk: Chunk) -> bool:
    """The last part of a long prompt is not put off: it would be in the way of others again."""
    return chunk.samples and chunk.length == 1 and chunk.sequence.request.params.grammar is not None


def _user(chunk: Chunk) -> str:
    return chunk.sequence.request.user
