"""Who has a turn, where not all can have one in every step."""

from __future__ import annotations

import heapq

from scheduler.core.sequence import Sequence


class Rotation:
    """Turns in rotation: who was served last waits longest. Those of one user share that user's part of each turn,
    so who has few of them is not slower for another's many."""

    def __init__(self) -> None:
        self._num_turns = 0
        self._last: dict[Sequence, int] = {}  # the number of each decoding sequence's last turn

    def next(self, decoding: list[Sequence], size: int) -> list[Sequence]:
        """`size` of them: of each user the one that waited longest, and of what is left to each by weight; among
        equals who waited longest. A user of U whose weight is the share w of all has a part of at least
        1 + floor(w * (size - U)), where U is at most `size` and they have so many."""
        last = {sequence: self._last.get(sequence, 0) for sequence in decoding}
        taken: dict[str, int] = {}
        order: list[tuple[float, int, int]] = []
        waited = sorted(decoding, key=last.__getitem__)
        for place, sequence in enumerate(waited):
            user = sequence.request.user
            before = taken.get(user, 0)
            taken[user] = before + 1
            order.append((before / sequence.request.weight, last[sequence], place))
        chosen = [waited[place] for _, _, place in heapq.nsmallest(size, order)]
        for sequence in chosen:
            self._num_turns += 1
            last[sequence] = self._num_turns
        self._last = last
        return chosen

    def forget(self) -> None:
        """Begin anew: nobody has had a turn."""
        self._last.clear()
