"""Seats change hands: those who owe theirs to somebody who waits, or sit on loan, give way to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from scheduler.planning.passing import Passing
from scheduler.planning.seating import Seating
from scheduler.planning.sequence import Sequence
from scheduler.planning.yielding import Yielded

Loss = Callable[[Sequence], int]
"""Guesses how many tokens a running sequence will have to compute again if it gives way."""


class Owed(Protocol):
    """What a policy says of seats that change hands."""

    def yielding(self, candidate: Sequence, running: Collection[Sequence], loss: Loss) -> Iterator[Sequence]:
        """Running sequences that should give up their seats to the waiting `candidate`, the first to go first."""


class GivingWay:
    """Lets those go whom the policy names, and those on loan (passing.py): as few as it takes."""

    def __init__(self, policy: Owed) -> None:
        self._policy = policy
        self._passing = Passing()
        self._left_blocks: dict[Sequence, int] = {}  # cached, of those who lost their seats and wait to resume

    def begin(self) -> None:
        self._passing.begin()

    def owing(self, candidate: Sequence, seating: Seating, kept: Collection[Sequence]) -> list[Sequence]:
        running = seating.running.values()
        owed = self._policy.yielding(candidate, running, self._losses(candidate, seating))
        every = dict.fromkeys((*owed, *self._passing.loans(candidate)))
        return [sequence for sequence in every if sequence not in kept]

    def going(self, candidate: Sequence, seating: Seating, owing: list[Sequence]) -> list[Yielded] | None:
        """What is cached is looked up only where that can make a difference."""
        most_freed = sum(each.held.num_blocks + seating.ahead(each, candidate) for each in owing)
        if seating.most_spare_blocks(candidate) + most_freed < 0:
            return None
        loss = self._losses(candidate, seating)
        prefix = seating.cached_prefix(candidate)
        kept = set(prefix.blocks)
        spare = seating.num_spare_blocks(candidate, prefix)
        going: list[Yielded] = []
        for sequence in owing:
            going.append(Yielded(sequence, loss(sequence)))
            spare += num_freed(seating, sequence, candidate, kept)
            if spare >= 0:
                return going
        return going if spare >= 0 else None

    def passed(self, sequence: Sequence) -> bool:
        return self._passing.passed(sequence)

    def seated(self, sequence: Sequence) -> None:
        self._passing.seated(sequence)
        self._left_blocks.pop(sequence, None)

    def unseated(self, sequence: Sequence) -> None:
        self._passing.forget(sequence)
        lease = sequence.held
        self._left_blocks[sequence] = sum(len(lease.prefix) - table.first for table in lease.tables)

    def forget(self, sequence: Sequence) -> None:
        self._passing.forget(sequence)
        self._left_blocks.pop(sequence, None)

    def _losses(self, candidate: Sequence, seating: Seating) -> Loss:
        """Nothing is lost while the pool can keep what all who run will hold soon, and what those who lost their
        seats left there."""
        excess: int | None = None

        def loss(sequence: Sequence) -> int:
            nonlocal excess
            if excess is None:
                held = sum(map(seating.blocks_soon, (candidate, *seating.running.values())))
                excess = max(0, held + sum(self._left_blocks.values()) - seating.pool.num_blocks)
            lost = sequence.num_computed_tokens
            return min(lost, excess * seating.pool.block_size) if seating.prefix_caching else lost

        return loss


def num_freed(seating: Seating, sequence: Sequence, candidate: Sequence, kept: set[int]) -> int:
    """How many more blocks would be spare for a waiting sequence if a running one gave way. `kept`: blocks that
    are part of the waiting one's prefix."""
    blocks = (block for table in sequence.held.tables for block in table.blocks if block not in kept)
    return sum(seating.pool.references[block] == 1 for block in blocks) + seating.ahead(sequence, candidate)
