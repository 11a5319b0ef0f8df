"""Do the accounts of seats and blocks add up? And the block pool as a picture."""

from __future__ import annotations

import numpy as np

from scheduler.core.blocks import BlockPool
from scheduler.core.scheduler import Scheduler
from scheduler.core.seating import Seating


def violations(seating: Seating) -> list[str]:
    """What does not add up in the seats and in the pool; takes a look at every block."""
    found = []
    leases = [sequence.held for sequence in seating.running.values()]
    if sorted([*seating.free_seats, *(lease.seat for lease in leases)]) != list(range(seating.num_seats)):
        found.append(f"the free seats and those of {len(leases)} sequences are not all seats")
    held = [block for lease in leases for block in lease.blocks]
    return found + _of_pool(seating.pool, held)


def _of_pool(pool: BlockPool, held: list[int]) -> list[str]:
    """What does not add up, if `held` are the blocks that sequences refer to, each as often as they do."""
    found = []
    references = np.bincount(np.array(held, np.int64), minlength=pool.num_blocks)
    counted = np.frombuffer(pool.references, np.intc)
    wrong = np.flatnonzero(references != counted)
    if len(wrong):
        block = wrong[0]
        found.append(
            f"{len(wrong)} blocks are referred to more or less often than it is counted, like {block}: "
            f"{references[block]} and {counted[block]} times"
        )
    idle = np.bincount([*pool.free_blocks, *pool.cached_blocks], minlength=pool.num_blocks)
    if not np.array_equal(idle, counted == 0):
        found.append(f"{pool.num_free} blocks are free or cached, and they are not those that nobody refers to")
    num_contents = pool.num_blocks - pool.identities.count(None)
    in_use = (*np.flatnonzero(references).tolist(), *pool.cached_blocks)
    if num_contents != sum(pool.identities[block] is not None for block in in_use):
        found.append("a block that is free has a content")
    if any(pool.identities[block] is None for block in pool.cached_blocks):
        found.append("a block that is cached has no content")
    for identity, content in pool.published.items():
        if any(pool.identities[block] != identity for copies in content.copies for block in copies):
            found.append("a block has another content than the one under which it is found")
            break
    return found


def set_up_anew(scheduler: Scheduler) -> None:
    """All who run begin anew from an empty pool, as after a preemption: nobody reads what may be another's."""
    sequences = list(scheduler.running.values())
    scheduler.seating.reset()
    for sequence in sequences:
        sequence.lease = None
        scheduler.admission.wait_again(sequence)


def picture(pool: BlockPool, num_cells: int) -> bytes:
    """One byte for each block, or for each group of neighbours where there are more blocks than `num_cells`. 0:
    free; 1: cached; 2: used; 3: shared by several sequences. A group shows the highest of its blocks."""
    states = bytearray(pool.num_blocks)
    for block in pool.cached_blocks:
        states[block] = 1
    for block, count in enumerate(pool.references):
        if count:
            states[block] = 2 if count == 1 else 3
    width = -(-pool.num_blocks // num_cells)
    if width == 1:
        return bytes(states)
    return bytes(max(states[start : start + width]) for start in range(0, pool.num_blocks, width))
