"""How many blocks a sequence holds, where some layers see only a window of the keys before a query.

Layers of the same window form groups, and a sequence has a block table for each group. What fell out of a group's
window goes back to the pool, so a sequence holds few blocks in that group however long it gets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from scheduler.core.seams import ENDLESS


def blocks_behind(window: int | None, block_size: int) -> int:
    """How many blocks before a block hold keys that its first token sees; `ENDLESS` without a window."""
    return ENDLESS if window is None else -(-(window - 1) // block_size)


class Holdings:
    """What a sequence holds in groups with these windows (None: it sees everything), computed in chunks of at most
    `longest_chunk` tokens."""

    def __init__(self, windows: Sequence[int | None], block_size: int, longest_chunk: int) -> None:
        self._block_size = block_size
        ahead = -(-(longest_chunk - 1) // block_size) + 1  # a chunk may begin at the last place of a block
        self.limits = [blocks_behind(window, block_size) + ahead for window in windows]
        """The most blocks that a sequence holds in each group."""
        self._counts = list(Counter(self.limits).items())

    def blocks(self, num_tokens: int) -> int:
        """The most blocks that a sequence of so many tokens holds at once, over all groups."""
        return self._of(-(-num_tokens // self._block_size))

    def longest(self, num_blocks: int) -> int:
        """Tokens of the longest sequence that `num_blocks` blocks hold."""
        return (bisect_right(range(ENDLESS), num_blocks, key=self._of) - 1) * self._block_size

    def _of(self, length: int) -> int:
        total = 0
        for limit, count in self._counts:
            total += count * (length if length < limit else limit)
        return total
