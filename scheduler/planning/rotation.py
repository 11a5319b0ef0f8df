"""Who has a turn, where not all can have one in every step."""

from __future__ import annotations

from scheduler.request import Sequence


class Rotation:
    """Turns in rotation: who was served last waits longest."""

    def __init__(self) -> None:
        self._num_turns = 0
        self._last: dict[Sequence, int] = {}  # the number of each decoding sequence's last turn

    def next(self, decoding: list[Sequence], size: int) -> list[Sequence]:
        """The `size` of them that waited longest."""
        last = {sequence: self._last.get(sequence, 0) for sequence in decoding}
        chosen = sorted(decoding, key=last.__getitem__)[:size]
        for sequence in chosen:
            self._num_turns += 1
            last[sequence] = self._num_turns
        self._last = last
        return chosen

    def forget(self) -> None:
        """Begin anew: nobody has had a turn."""
        self._last.clear()
