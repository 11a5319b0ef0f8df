"""How a generation goes on beyond the model's window: the oldest tokens make room, block by block.

After StreamingLLM (Xiao et al., arXiv 2309.17453): attention needs the first tokens of a text as sinks for what it
does not spend elsewhere, and little else of what is long past. So the first block stays, and whenever the window
is full the block behind it is dropped. The paper gives every token its place in the cache as its position. For a
rotary embedding only distances count: here all tokens keep the positions that they were computed with, and the
sinks are turned on by what was dropped, which gives the same distances and touches one block.

What is dropped when is a function of a token's position alone, so the same request has the same bits however it is
cut into steps, and however often it is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler.core.blocks import BlockPool
from scheduler.core.sequence import Sequence
from scheduler.core.step import SeatChanges, SinkShift, TableChange


class ContextWindow(NamedTuple):
    """What a sequence can look back on, in whole blocks."""

    num_tokens: int
    """A multiple of `block_size`."""
    block_size: int
    longest: int
    """Tokens of the longest sequence that goes on beyond it: positions end somewhere."""

    def shift_at(self, position: int) -> int:
        """How many tokens have been dropped when the one at this position is computed."""
        if position < self.num_tokens:
            return 0
        return ((position - self.num_tokens) // self.block_size + 1) * self.block_size

    def until_shift(self, position: int) -> int:
        """How many tokens from this position on are computed before more are dropped."""
        if position < self.num_tokens:
            return self.num_tokens - position
        return self.block_size - (position - self.num_tokens) % self.block_size

    def make_way(self, sequence: Sequence, pool: BlockPool, changes: SeatChanges) -> bool:
        """Drop what has to make room for the next token; False if there is no block for the first one's copy."""
        lease = sequence.held
        shift = self.shift_at(sequence.num_computed_tokens)
        num_dropped = (shift - lease.shift) // self.block_size
        if num_dropped == 0:
            return True
        (table,) = lease.tables
        if lease.sink is None:
            if pool.num_free == 0:
                return False
            lease.sink = table.blocks[0]
            table.blocks[0] = pool.allocate(1)[0]
        pool.free(table.blocks[1 : 1 + num_dropped])
        del table.blocks[1 : 1 + num_dropped]
        lease.shift = shift
        changes.tables.append(TableChange(lease.seat, 0, list(table.blocks)))
        changes.shifts.append(SinkShift(lease.sink, table.blocks[0], shift))
        return True
