"""Who sits where, and on which blocks."""

from __future__ import annotations

import heapq

from scheduler.core.blocks import BlockPool, Identity, Prefix
from scheduler.core.request import Request
from scheduler.core.seams import States
from scheduler.core.sequence import BlockTable, Lease, Sequence
from scheduler.core.step import SeatChanges, TableChange
from scheduler.core.windows import Holdings


class Seating:
    """The seats, and the running sequences' account with the block pool. Users share cached prefixes only with
    `share_prefixes`."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        num_seats: int,
        longest_chunk: int,
        prefix_caching: bool,
        share_prefixes: bool,
        states: States,
    ) -> None:
        self.pool = pool
        self.holdings = Holdings(pool.windows, pool.block_size, longest_chunk)
        self.num_seats = num_seats
        self.prefix_caching = prefix_caching
        self._share_prefixes = share_prefixes
        self._has_windows = any(window is not None for window in pool.windows)
        self._states = states
        self.reset()

    def reset(self) -> None:
        """All seats are free, and so are all blocks, whoever had them."""
        self.running: dict[tuple[str, int], Sequence] = {}
        self.free_seats = list(range(self.num_seats))
        """A heap: low seats are taken first."""
        self._chains: dict[Sequence, list[Identity]] = {}  # of the blocks of those who wait, and were looked up
        self._changes = SeatChanges(vacated=list(range(self.num_seats)))
        self._states.reset()
        self.pool.reset()

    @property
    def num_free_seats(self) -> int:
        return len(self.free_seats)

    def take_changes(self) -> SeatChanges:
        """What has happened since the last call."""
        changes, self._changes = self._changes, SeatChanges()
        return changes

    # The prefix cache -----------------------------------------------------------------------------------

    def root(self, request: Request, *kind: str) -> Identity:
        """What a request's first block follows. Users find each other's prefixes only where that was asked for:
        how many of a prompt's tokens are cached tells what others have said. `kind`: what else the keys and values
        of its tokens depend on."""
        owner = "" if self._share_prefixes else request.user
        return self.pool.root(owner, request.cache_salt, *kind)

    def cached_prefix(self, sequence: Sequence) -> Prefix:
        """What the prefix cache has of a waiting sequence. Where something of each token is wanted, of what has
        given it already."""
        token_ids = sequence.token_ids
        if sequence.is_read:
            token_ids = token_ids[: sequence.num_ever_computed + 1]
        if len(token_ids) > sequence.window.num_tokens:  # it drops nothing before it computes
            token_ids = token_ids[: sequence.window.num_tokens]
        return self._lookup(token_ids, sequence.root, self._chains.setdefault(sequence, []))

    def num_cached_tokens(self, request: Request, *kind: str) -> int:
        """How many tokens of a new request's prompt need not be computed, as things stand."""
        prefix = self._lookup(request.prompt_token_ids, self.root(request, *kind), [])
        return len(prefix.identities) * self.pool.block_size

    def _lookup(self, token_ids: list[int], root: Identity, chain: list[Identity]) -> Prefix:
        """What the cache has of these tokens, up to where there is a state too, of a model that keeps them."""
        if not self.prefix_caching:
            return Prefix([BlockTable(0, []) for _ in self.pool.windows], [])
        prefix = self.pool.lookup(token_ids, root, chain)
        num_known = len(prefix.identities)
        while (count := self._states.reach(prefix.identities)) < len(prefix.identities):
            prefix = self.pool.lookup(token_ids[: count * self.pool.block_size + 1], root, chain)
        return prefix._replace(num_known=num_known)

    def settle(self, sequence: Sequence) -> None:
        """After a step: make the blocks that a sequence has filled findable, and give back those that no layer of
        their group will look at again."""
        size, lease = self.pool.block_size, sequence.held
        # What is computed without the tokens that were dropped is its own.
        num_filled = min(sequence.num_computed_tokens, sequence.window.num_tokens) // size
        if self.prefix_caching:
            prefix = lease.prefix
            while len(prefix) < num_filled:
                place = len(prefix)
                parent = prefix[-1] if prefix else sequence.root
                tokens = sequence.token_ids[place * size : (place + 1) * size]
                blocks = [table.blocks[place - table.first] for table in lease.tables]
                prefix.append(self.pool.publish(blocks, parent, tokens))
            if num_filled * size == sequence.num_computed_tokens:
                self._states.settle(sequence, self._changes)
        if self._has_windows:
            for table, behind in zip(lease.tables, self.pool.behind, strict=True):
                # Counted from the last block that is full, where the sequence would resume after a preemption.
                num_gone = num_filled - behind - table.first
                if num_gone > 0:
                    self.pool.free(table.blocks[:num_gone])
                    del table.blocks[:num_gone]
                    table.first += num_gone

    # Coming and going -----------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give a waiting sequence a seat, and blocks for its known tokens: all of them in groups that see
        everything, and in the others as many as it holds at most while they are computed."""
        self.pool.share(prefix.blocks)
        num_cached = sequence.num_computed_tokens = len(prefix.identities) * self.pool.block_size
        tables = [BlockTable(table.first, []) for table in prefix.tables]
        lease = sequence.lease = Lease(heapq.heappop(self.free_seats), num_cached, tables, prefix.identities)
        missing = self._missing(prefix.tables, num_places(sequence))
        for group, (table, count) in enumerate(zip(prefix.tables, missing, strict=True)):
            self._extend(lease, group, table.blocks + self.pool.allocate(count))
        self._states.begin(sequence, prefix, self._changes)
        self.running[sequence.key] = sequence
        self.forget(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the blocks for its known tokens, as far as its next step goes; False if there
        are not enough."""
        lease = sequence.held
        is_full = sequence.num_computed_tokens >= sequence.window.num_tokens
        if is_full and not sequence.window.make_way(sequence, self.pool, self._changes):
            return False
        places = num_places(sequence, lease.shift)
        table = lease.tables[-1]  # the narrowest window's: no other has fewer blocks ahead
        if (table.first + len(table.blocks)) * self.pool.block_size >= places:
            return True
        return self._take(lease, self._missing(lease.tables, places), self.pool.num_free)

    def reserve(self, sequence: Sequence, num_drafted: int) -> bool:
        """Give a running sequence the blocks for guessed tokens; False if there are none to spare: nobody is
        preempted for a guess, in the next step neither."""
        lease = sequence.held
        num_spare = self.pool.num_free - len(self.pool.windows) * len(self.running)
        places = num_places(sequence, lease.shift, num_drafted)
        return self._take(lease, self._missing(lease.tables, places), num_spare)

    def _take(self, lease: Lease, missing: list[int], most: int) -> bool:
        """Give it so many blocks more in each group; False if that is more than `most` together."""
        if sum(missing) > most:
            return False
        for group, count in enumerate(missing):
            if count > 0:
                self._extend(lease, group, self.pool.allocate(count))
        return True

    def _missing(self, tables: list[BlockTable], num_tokens: int) -> list[int]:
        """How many blocks each group lacks for so many tokens, or for as many as it can hold of them now."""
        end = self.pool.blocks_for(num_tokens)
        limits = self.holdings.limits
        return [
            max(0, min(end, table.first + limit) - table.end) for table, limit in zip(tables, limits, strict=True)
        ]

    def _extend(self, lease: Lease, group: int, blocks: list[int]) -> None:
        table = lease.tables[group]
        self._changes.tables.append(TableChange(lease.seat, table.end, blocks, group))
        table.blocks += blocks

    def vacate(self, sequence: Sequence) -> None:
        """Take back a running sequence's seat and blocks; the full ones stay cached for its return."""
        lease, sequence.lease = sequence.held, None
        self.pool.free(_in_order(lease.tables))
        if lease.sink is not None:
            self.pool.free([lease.sink])
        self._changes.loads = [load for load in self._changes.loads if load.seat != lease.seat]
        heapq.heappush(self.free_seats, lease.seat)
        self._changes.vacated.append(lease.seat)
        del self.running[sequence.key]

    def forget(self, sequence: Sequence) -> None:
        """A sequence does not wait any longer."""
        self._chains.pop(sequence, None)

    def num_spare_blocks(self, candidate: Sequence, prefix: Prefix) -> int:
        """Blocks that are free beyond what a waiting sequence takes, and beyond one of each group for each running
        sequence, or the next step would preempt at once."""
        missing = sum(self._missing(prefix.tables, num_places(candidate)))
        ahead = len(self.pool.windows) * len(self.running)
        return self.pool.num_free_after_sharing(prefix.blocks) - missing - ahead


def num_places(sequence: Sequence, shift: int = 0, num_drafted: int = 0) -> int:
    """Of a sequence's known tokens, and of guesses behind them, in its block table: no more than its window has,
    as what is dropped makes room first."""
    return min(len(sequence.token_ids) + num_drafted - shift, sequence.window.num_tokens)


def _in_order(tables: list[BlockTable]) -> list[int]:
    """The blocks of all groups in the order of their tokens: one is of no use to the prefix cache without the
    others of its place, so they are to be evicted together."""
    if len(tables) == 1:
        return tables[0].blocks
    placed = [(place, block) for table in tables for place, block in enumerate(table.blocks, table.first)]
    return [block for _, block in sorted(placed)]
