"""Blocks to spare, for whoever waits: as things are, and as they will be when all have gone on for a while."""

from __future__ import annotations

from scheduler.core.blocks import Prefix
from scheduler.core.seating import Seating, num_places
from scheduler.core.sequence import Sequence

HORIZON = 1024
"""How many tokens of each sequence to look ahead, to tell whether blocks are scarce."""


def num_spare_blocks(seating: Seating, candidate: Sequence, prefix: Prefix) -> int:
    """As `Seating.num_spare_blocks`; but one that was crowded out before comes back only when all can go on for a
    while: it would otherwise compute the same tokens again and again."""
    if not _comes_to_stay(seating, candidate):
        return seating.num_spare_blocks(candidate, prefix)
    missing = blocks_soon(seating, candidate) - len(prefix.blocks)
    return seating.pool.num_free_after_sharing(prefix.blocks) - missing - _all_ahead(seating, candidate)


def most_spare_blocks(seating: Seating, candidate: Sequence) -> int:
    """What `num_spare_blocks` says at most, whatever is cached: a cached block that nobody refers to is taken from
    what is free, so only those count that are in use. Takes O(running sequences)."""
    pool = seating.pool
    if pool.windows[0] is not None:
        return pool.num_free
    if _comes_to_stay(seating, candidate):
        missing = blocks_soon(seating, candidate)
    else:
        missing = pool.blocks_for(num_places(candidate))
    shared = sum(
        table.end for each in seating.running.values() if each.root == candidate.root for table in each.held.tables
    )
    return pool.num_free - max(0, missing - shared) - _all_ahead(seating, candidate)


def num_freed(seating: Seating, sequence: Sequence, candidate: Sequence, kept: set[int]) -> int:
    """How many more blocks would be spare for a waiting sequence if a running one gave way. `kept`: blocks that
    are part of the waiting one's prefix."""
    blocks = (block for table in sequence.held.tables for block in table.blocks if block not in kept)
    return sum(seating.pool.references[block] == 1 for block in blocks) + _ahead(seating, sequence, candidate)


def most_freed(seating: Seating, sequence: Sequence, candidate: Sequence) -> int:
    """What `num_freed` says at most. Takes O(1)."""
    return sequence.held.num_blocks + _ahead(seating, sequence, candidate)


def blocks_soon(seating: Seating, sequence: Sequence) -> int:
    """What a sequence holds when it has gone on for a while."""
    window = sequence.window
    most = sequence.num_prompt_tokens + (sequence.request.params.max_tokens or window.longest)
    soon = min(sequence.num_tokens + HORIZON, most)
    if soon > window.num_tokens:
        return seating.holdings.blocks(window.num_tokens) + 1  # the first one's copy
    return min(seating.holdings.blocks(soon), seating.pool.num_blocks)


def _comes_to_stay(seating: Seating, candidate: Sequence) -> bool:
    return candidate.crowded_out and len(seating.running) > 0


def _all_ahead(seating: Seating, candidate: Sequence) -> int:
    return sum(_ahead(seating, each, candidate) for each in seating.running.values())


def _ahead(seating: Seating, sequence: Sequence, candidate: Sequence) -> int:
    """Blocks that are kept for a running sequence to grow into, beside a waiting one."""
    if candidate.crowded_out:
        return blocks_soon(seating, sequence) - sequence.held.num_blocks
    return len(seating.pool.windows)
