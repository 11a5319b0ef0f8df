"""Who sits where, and on which blocks."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from scheduler.planning.blocks import BlockPool, Identity, Prefix
from scheduler.request import Request, Sequence
from scheduler.step import TableChange

HORIZON = 1024
"""How many tokens of each sequence to look ahead, to tell whether blocks are scarce."""


class Seating:
    """The seats, and the running sequences' account with the block pool. Users share cached prefixes only with
    `share_prefixes`."""

    def __init__(
        self, pool: BlockPool, *, num_seats: int, max_model_len: int, prefix_caching: bool, share_prefixes: bool
    ) -> None:
        self.pool = pool
        self.running: dict[tuple[str, int], Sequence] = {}
        self._max_model_len = max_model_len
        self._prefix_caching = prefix_caching
        self._share_prefixes = share_prefixes
        self._free = list(range(num_seats))  # a heap: low seats are taken first
        self._kept_blocks: dict[tuple[str, int], int] = {}  # cached blocks of those who wait to resume
        self._changes: list[TableChange] = []

    @property
    def num_free_seats(self) -> int:
        return len(self._free)

    def take_changes(self) -> list[TableChange]:
        """What is new in the seats' block tables since the last call."""
        changes, self._changes = self._changes, []
        return changes

    # The prefix cache -----------------------------------------------------------------------------------

    def root(self, request: Request) -> Identity:
        """Users find each other's prefixes only where that was asked for: how many of a prompt's tokens are cached
        tells what others have said."""
        return self.pool.root("" if self._share_prefixes else request.user, request.cache_salt)

    def cached_prefix(self, token_ids: list[int], root: Identity) -> Prefix:
        return self.pool.lookup(token_ids, root) if self._prefix_caching else Prefix([], [])

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks that a sequence has filled findable."""
        if not self._prefix_caching:
            return
        size = self.pool.block_size
        prefix = sequence.prefix
        for index in range(len(prefix), sequence.num_computed_tokens // size):
            parent = prefix[-1] if prefix else sequence.root
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            prefix.append(self.pool.publish(sequence.block_table[index], parent, tokens))

    # Coming and going -----------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give a waiting sequence a seat, and blocks for all its known tokens."""
        self.pool.share(prefix.blocks)
        sequence.prefix = prefix.identities
        sequence.num_computed_tokens = len(prefix.blocks) * self.pool.block_size
        missing = self.pool.blocks_for(sequence.num_tokens) - len(prefix.blocks)
        sequence.seat = heapq.heappop(self._free)
        self._extend(sequence, prefix.blocks + self.pool.allocate(missing))
        self.running[sequence.key] = sequence
        self.forget(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the blocks for all its known tokens; False if there are not enough."""
        missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        if missing > self.pool.num_free:
            return False
        self._extend(sequence, self.pool.allocate(missing))
        return True

    def _extend(self, sequence: Sequence, blocks: list[int]) -> None:
        assert sequence.seat is not None
        self._changes.append(TableChange(sequence.seat, len(sequence.block_table), blocks))
        sequence.block_table += blocks

    def vacate(self, sequence: Sequence, *, comes_back: bool = False) -> None:
        """Take back a running sequence's seat and blocks; the full ones stay cached for its return."""
        assert sequence.seat is not None
        if comes_back:
            self._kept_blocks[sequence.key] = len(sequence.prefix)
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.prefix = []
        heapq.heappush(self._free, sequence.seat)
        sequence.seat = None
        del self.running[sequence.key]

    def forget(self, sequence: Sequence) -> None:
        """A sequence does not wait to come back any longer."""
        self._kept_blocks.pop(sequence.key, None)

    # Room -----------------------------------------------------------------------------------------------

    def num_spare_blocks(self, candidate: Sequence, prefix: Prefix) -> int:
        """Blocks that are free beyond what a waiting sequence takes, and beyond one for each running sequence, or
        the next step would preempt at once. One that was crowded out before comes back only when all can go on for
        a while: it would otherwise compute the same tokens again and again."""
        missing = self.pool.blocks_for(candidate.num_tokens) - len(prefix.blocks)
        ahead = len(self.running)
        if candidate.crowded_out and self.running:
            missing = self._blocks_soon(candidate) - len(prefix.blocks)
            ahead = sum(self._blocks_soon(each) - len(each.block_table) for each in self.running.values())
        return self.pool.num_free_after_sharing(prefix.blocks) - missing - ahead

    def losses(self, candidate: Sequence) -> Callable[[Sequence], int]:
        """Guesses how many tokens a running sequence will have to compute again if it gives way to a waiting one:
        none while the pool can keep what all who run will hold soon, and what those who gave way left there."""
        excess: int | None = None

        def loss(sequence: Sequence) -> int:
            nonlocal excess
            if excess is None:
                held = sum(self._blocks_soon(each) for each in (candidate, *self.running.values()))
                excess = max(0, held + sum(self._kept_blocks.values()) - self.pool.num_blocks)
            lost = sequence.num_computed_tokens
            return min(lost, excess * self.pool.block_size) if self._prefix_caching else lost

        return loss

    def _blocks_soon(self, sequence: Sequence) -> int:
        """What a sequence holds when it has gone on for a while."""
        most = sequence.num_prompt_tokens + (sequence.request.params.max_tokens or self._max_model_len)
        return self.pool.blocks_for(min(sequence.num_tokens + HORIZON, most))
