"""Which states are put aside, of models that keep more of a sequence than keys and values.

A state stands for all tokens before it and cannot be cut back, so a cached prefix is of use to such a model only
where a state was put aside at its end: at the border of a block, under the identity of the prefix (blocks.py).
Where the prefix cache knows more of a prompt than there is a state for, whoever computes it puts one aside there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from scheduler.planning.blocks import Identity


class SavedStates:
    """Says what lies in `num_slots` slots, and frees the least recently used one for what is new."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self.reset()

    def reset(self) -> None:
        """Nothing is put aside any more."""
        self._slots: OrderedDict[Identity, int] = OrderedDict()  # least recently used first
        self._free = list(range(self._num_slots))

    def reach(self, identities: Sequence[Identity]) -> int:
        """Of a prefix's blocks, how many the longest one has that ends in a state."""
        for count in range(len(identities), 0, -1):
            if identities[count - 1] in self._slots:
                return count
        return 0

    def use(self, identity: Identity) -> int:
        """Its slot. Raises KeyError if there is none."""
        self._slots.move_to_end(identity)
        return self._slots[identity]

    def save(self, identity: Identity) -> int | None:
        """The slot for a new state; None if it is there already."""
        if identity in self._slots:
            self._slots.move_to_end(identity)
            return None
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        self._slots[identity] = slot
        return slot

    def drop(self, identity: Identity) -> None:
        """It will hardly be asked for again."""
        slot = self._slots.pop(identity, None)
        if slot is not None:
            self._free.append(slot)
