"""Seats change hands: those who owe theirs to somebody who waits, or sit on loan, give way to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from scheduler.core.blocks import Prefix
from scheduler.core.seams import Yielded
from scheduler.core.seating import Seating
from scheduler.core.sequence import Sequence
from scheduler.features.passing import Passing
from scheduler.features.room import blocks_soon, most_freed, most_spare_blocks, num_freed, num_spare_blocks

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

    def fits(self, candidate: Sequence, seating: Seating) -> Prefix | None:
        """What is cached is looked up only where that can make a difference."""
        if most_spare_blocks(seating, candidate) < 0:
            return None
        prefix = seating.cached_prefix(candidate)
        return prefix if num_spare_blocks(seating, candidate, prefix) >= 0 else None

    def owing(self, candidate: Sequence, seating: Seating, kept: Collection[Sequence]) -> list[Sequence]:
        running = seating.running.values()
        owed = self._policy.yielding(candidate, running, self._losses(candidate, seating))
        every = dict.fromkeys((*owed, *self._passing.loans(candidate)))
        return [sequence for sequence in every if sequence not in kept]

    def going(self, candidate: Sequence, seating: Seating, owing: list[Sequence]) -> list[Yielded] | None:
        most = sum(most_freed(seating, each, candidate) for each in owing)
        if most_spare_blocks(seating, candidate) + most < 0:
            return None
        loss = self._losses(candidate, seating)
        prefix = seating.cached_prefix(candidate)
        kept = set(prefix.blocks)
        spare = num_spare_blocks(seating, candidate, prefix)
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
                held = sum(blocks_soon(seating, each) for each in (candidate, *seating.running.values()))
                excess = max(0, held + sum(self._left_blocks.values()) - seating.pool.num_blocks)
            lost = sequence.num_computed_tokens
            return min(lost, excess * seating.pool.block_size) if seating.prefix_caching else lost

        return loss
