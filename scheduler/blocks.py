"""The block pool: which KV blocks are free, who holds the others, and which of them hold a known prefix.

A block is room for the keys and values of `block_size` consecutive tokens in every layer. The pool deals only
in block ids; the tensors behind them are in kv_cache.py. PagedAttention is from Kwon et al., arXiv 2309.06180.

**The prefix cache.** A full block whose content is known is *published* under the key `(parent, tokens)`: its
tokens, and the identity of the published block before it. Identities are serial numbers that are never reused,
so a key stands for the whole prefix, and equality of keys is equality of all tokens up to here: Python's dict
hashes the key and then compares it, so two prefixes whose hashes collide are still told apart. The parent of a
first block is a salt, any hashable value that names whatever else the KV content depends on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class NoFreeBlocksError(RuntimeError):
    """More blocks were asked for than are free. Ask `num_free` first."""


class Prefix(NamedTuple):
    """The longest cached prefix of some tokens: its blocks in order, and the identity of each."""

    blocks: list[int]
    identities: list[int]


class BlockPool:
    """Hands out `num_blocks` block ids, counts references, and remembers the content of full blocks.

    Every block is in one of three states:

    - **free**: nobody refers to it and its content is unknown;
    - **cached**: nobody refers to it, but its content is published, so a later sequence may share it until
      it is evicted, least recently used first;
    - **used**: `reference count` sequences refer to it.

    Free and cached blocks can both be allocated: `num_free` counts them together. Allocating and freeing a
    block take O(1).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be positive, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keys: list[tuple[Hashable, tuple[int, ...]] | None] = [None] * num_blocks
        self._published: dict[tuple[Hashable, tuple[int, ...]], tuple[int, int]] = {}  # key: (block, identity)
        self._last_identity = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to but whose content can still be shared."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - self.num_free

    def map(self, num_cells: int) -> bytes:
        """The pool as a picture: one byte for each block, or for each group of neighbours where there are more
        blocks than `num_cells`. 0: free; 1: cached; 2: used; 3: shared by several sequences. A group shows the
        highest of its blocks."""
        states = bytearray(self.num_blocks)
        for block in self._cached:
            states[block] = 1
        for block, count in enumerate(self._references):
            if count:
                states[block] = 2 if count == 1 else 3
        width = -(-self.num_blocks // num_cells)
        if width == 1:
            return bytes(states)
        return bytes(max(states[start : start + width]) for start in range(0, self.num_blocks, width))

    def references(self, block: int) -> int:
        """How many sequences refer to `block`."""
        return self._references[block]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of unspecified content, each with one reference.

        Free blocks go first, then cached ones are evicted. Raises `NoFreeBlocksError`, and takes nothing, if
        fewer than `count` are free.
        """
        if count > self.num_free:
            raise NoFreeBlocksError(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free")
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._published[key]
        self._keys[block] = None
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each of a sequence's `blocks`, given in the order of its tokens.

        A published block that loses its last reference stays cached. The end of the sequence is evicted before
        its beginning, since a block can be found only while all blocks before it can.
        Raises `ValueError` for a block that nobody refers to.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} is freed twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of `blocks`, which `lookup` has just found."""
        for block in blocks:
            self._references[block] += 1
            self._cached.pop(block, None)

    def num_free_after_sharing(self, blocks: Iterable[int]) -> int:
        """What `num_free` would be after `share(blocks)`."""
        return self.num_free - sum(1 for block in blocks if self._references[block] == 0)

    def publish(self, block: int, parent: Hashable, tokens: Sequence[int]) -> int:
        """Make a full block findable, and return the identity of its content, the parent of the next block.

        `parent` is the identity of the block before it, or the salt for a first block. If another block of the
        same content is published already, that one stays the findable one and its identity is returned.
        """
        if len(tokens) != self.block_size:
            raise ValueError(f"only full blocks are published: {len(tokens)} tokens, not {self.block_size}")
        key = (parent, tuple(tokens))
        known = self._published.get(key)
        if known is not None:
            return known[1]
        self._last_identity += 1
        self._published[key] = (block, self._last_identity)
        self._keys[block] = key
        return self._last_identity

    def lookup(self, tokens: Sequence[int], salt: Hashable) -> Prefix:
        """Find the longest published prefix of `tokens` that leaves at least one token to compute.

        Takes no references: call `share` on the blocks before anything is allocated.
        """
        found = Prefix([], [])
        parent = salt
        size = self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            hit = self._published.get((parent, tuple(tokens[start : start + size])))
            if hit is None:
                break
            block, parent = hit
            found.blocks.append(block)
            found.identities.append(hit[1])
        return found
