"""Which states are put aside, of models that keep more of a sequence than keys and values.

A state stands for all tokens before it and cannot be cut back, so a cached prefix is of use to such a model only
where a state was put aside at its end: at the border of a block, under the identity of the prefix (blocks.py).
Where the prefix cache knows more of a prompt than there is a state for, whoever computes it puts one aside there.
"""

from __future__ import annotations

from collections import OrderedDict

from scheduler.core.blocks import Identity, Prefix
from scheduler.core.sequence import Sequence
from scheduler.core.step import SeatChanges, StateMove


class SavedStates:
    """Says what lies in `num_slots` slots, and frees the least recently used one for what is new. Blocks are of
    `block_size` tokens."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self._num_slots = num_slots
        self._block_size = block_size
        self.reset()

    def reset(self) -> None:
        self._slots: OrderedDict[Identity, int] = OrderedDict()  # least recently used first
        self._free = list(range(self._num_slots))

    def reach(self, identities: list[Identity]) -> int:
        for count in range(len(identities), 0, -1):
            if identities[count - 1] in self._slots:
                return count
        return 0

    def begin(self, sequence: Sequence, prefix: Prefix, changes: SeatChanges) -> None:
        """Begin with the state behind the prefix; and put others aside where others may begin: behind what is
        known of the prompt, and behind its last block."""
        lease, size = sequence.held, self._block_size
        if prefix.identities:
            self._slots.move_to_end(prefix.identities[-1])
            slot = self._slots[prefix.identities[-1]]
            changes.loads.append(StateMove(lease.seat, slot, sequence.num_computed_tokens))
        last = (sequence.num_tokens - 1) // size
        stops = sorted({last * size, prefix.num_known * size}, reverse=True)
        lease.stops = [stop for stop in stops if stop > sequence.num_computed_tokens]

    def settle(self, sequence: Sequence, changes: SeatChanges) -> None:
        """Put its state aside. Of its answer, the one before is of no use any more."""
        lease, num_tokens = sequence.held, sequence.num_computed_tokens
        identity = lease.prefix[-1]
        if lease.state is not None:
            self._drop(lease.state)
        lease.state = identity if num_tokens > sequence.num_prompt_tokens else None
        slot = self._save(identity)
        if slot is not None:
            changes.saves.append(StateMove(lease.seat, slot, num_tokens))

    def _save(self, identity: Identity) -> int | None:
        """The slot for a new state; None if it is there already."""
        if identity in self._slots:
            self._slots.move_to_end(identity)
            return None
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        self._slots[identity] = slot
        return slot

    def _drop(self, identity: Identity) -> None:
        """It will hardly be asked for again."""
        slot = self._slots.pop(identity, None)
        if slot is not None:
            self._free.append(slot)
