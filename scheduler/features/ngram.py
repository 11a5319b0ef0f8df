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

    The tokens' hashes stand for them: where two collide the guess is wrong, and is refused like any other. `base`
    is the index of the text's first `base_len` tokens, which several texts may have in common.
    """

    __slots__ = ("__weakref__", "_base", "_places", "num_indexed")

    def __init__(self, base: NgramIndex | None = None, base_len: int = 0) -> None:
        self._base = base
        self._places: list[dict[int, int]] = [{} for _ in SIZES]
        self.num_indexed = base_len
        """How many tokens of the text were taken in."""

    def extend(self, tokens: list[int], most: int = 1 << 40) -> int:
        """The text is now `tokens`: those that were there before, and more. Take in `most` of them at most, and
        return how many were."""
        start, end = self.num_indexed, min(len(tokens), self.num_indexed + most)
        if end <= start:
            return 0
        for size, places in zip(SIZES, self._places, strict=True):
            for place in range(max(size, start), end):
                places[hash(tuple(tokens[place - size : place]))] = place
        self.num_indexed = end
        return end - start

    def match(self, tokens: list[int]) -> Match | None:
        """Where the end of the text, which is `tokens`, occurred before, as far as it was taken in: the longest,
        and of those the latest."""
        for rank, size in enumerate(SIZES):
            place = self.place_of(rank, hash(tuple(tokens[-size:])))
            if place is not None:
                return Match(size, place)
        return None

    def place_of(self, rank: int, key: int) -> int | None:
        """Behind the latest tokens of this hash, which are as many as `SIZES` has at that rank."""
        place = self._places[rank].get(key)
        return self._base.place_of(rank, key) if place is None and self._base is not None else place


def continuation(tokens: list[int], place: int, count: int) -> list[int]:
    """`count` tokens as they follow from `place` on; beyond the end of the text they repeat."""
    period = tokens[place : place + count]
    return (period * -(-count // len(period)))[:count]
