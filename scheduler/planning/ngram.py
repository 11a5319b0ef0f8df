"""What follows the end of a text, as far as the text itself has said it before.

After "prompt lookup" (Saxena, 2023): who edits, extracts or translates a list repeats much of the prompt. Where
the last few tokens occurred before, what followed them there is a guess of what follows them now.
"""

from __future__ import annotations

from typing import NamedTuple

SIZES = (8, 4, 2)
"""How many tokens at the end are looked for, the most first."""


class Match(NamedTuple):
    """An earlier occurrence of the text's last tokens."""

    size: int
    """How many tokens are the same, one of `SIZES`."""
    place: int
    """Of the token that followed them there."""


class NgramIndex:
    """The latest occurrence of every sequence of `SIZES` tokens in one text. A token more takes O(1).

    The tokens' hashes stand for them: where two collide the guess is wrong, and is refused like any other.
    """

    __slots__ = ("_num_indexed", "_places")

    def __init__(self) -> None:
        self._places: list[dict[int, int]] = [{} for _ in SIZES]
        self._num_indexed = 0

    def extend(self, tokens: list[int]) -> None:
        """The text is now `tokens`: those that were there before, and more."""
        for size, places in zip(SIZES, self._places, strict=True):
            for place in range(max(size, self._num_indexed), len(tokens)):
                places[hash(tuple(tokens[place - size : place]))] = place
        self._num_indexed = max(self._num_indexed, len(tokens))

    def match(self, tokens: list[int]) -> Match | None:
        """Where the end of the text, which is `tokens`, occurred before: the longest, and of those the latest."""
        for size, places in zip(SIZES, self._places, strict=True):
            place = places.get(hash(tuple(tokens[-size:])))
            if place is not None:
                return Match(size, place)
        return None


def continuation(tokens: list[int], place: int, count: int) -> list[int]:
    """`count` tokens as they follow from `place` on; beyond the end of the text they repeat."""
    period = tokens[place : place + count]
    return (period * -(-count // len(period)))[:count]
