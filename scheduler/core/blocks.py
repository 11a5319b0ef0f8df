"""The block pool: which KV blocks are free, who holds the others, and which of them hold a known prefix.

A block is room for the keys and values of `block_size` consecutive tokens in every layer of a group (windows.py);
most models have a single group. The pool deals only in block ids; the tensors behind them are in kv_cache.py.
PagedAttention is from Kwon et al., arXiv 2309.06180.

**The prefix cache.** A full block whose content is known is *published* under an identity: a digest of its tokens
and of the identity of the block before it, so that an identity stands for the whole prefix. A first block's parent
is a root, the digest of whatever else the content depends on. Every block of the same content can be found: one
that is evicted takes nothing from the others and from those that follow them. The digest is keyed, so that nobody
who sends prompts can look for two that collide, and the tokens are compared all the same.

A prefix can be used where each group has the blocks that its window still sees; those before them may be gone, and
if no group has them any more, only the digest vouches for their tokens. One identity names all groups' blocks.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scheduler.core.seams import ENDLESS
from scheduler.core.sequence import BlockTable
from scheduler.core.windows import blocks_behind

Identity = bytes
"""What names a prefix, [16]."""


class NoFreeBlocksError(RuntimeError):
    """More blocks were asked for than are free. Ask `num_free` first."""


class Prefix(NamedTuple):
    """The longest cached prefix of some tokens."""

    tables: list[BlockTable]
    """For each group of layers, the blocks that what follows the prefix sees."""
    identities: list[Identity]
    """Of all its blocks, in their order."""
    num_known: int = 0
    """Blocks of it and after it whose keys and values are there, though no state is (saved_states.py)."""

    @property
    def blocks(self) -> list[int]:
        """Those of all groups."""
        return [block for table in self.tables for block in table.blocks]


class Content(NamedTuple):
    """What is known of the blocks of one identity."""

    parent: Identity
    tokens: tuple[int, ...]
    copies: list[dict[int, None]]
    """For each group of layers all its blocks of this content, in the order in which they were published."""


class BlockPool:
    """Hands out `num_blocks` block ids, counts references, and remembers the content of full blocks.

    `windows` has an entry for each group of layers, the widest first: how many keys a query sees there, its own
    among them; None: all.

    Every block is in one of three states:

    - **free**: nobody refers to it and its content is unknown;
    - **cached**: nobody refers to it, but its content is published, so a later sequence may share it until
      it is evicted, least recently used first;
    - **used**: `reference count` sequences refer to it.

    Free and cached blocks can both be allocated: `num_free` counts them together. Allocating and freeing a
    block take O(1).
    """

    def __init__(self, num_blocks: int, block_size: int, windows: Sequence[int | None] = (None,)) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be positive, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.behind = [blocks_behind(window, block_size) for window in windows]
        """For each group, how many blocks before a block's first token that token still sees."""
        self._secret = secrets.token_bytes(32)
        self.reset()

    def reset(self) -> None:
        """Forget who holds what: all blocks are free, and nothing is cached."""
        self.references = array("i", bytes(self.num_blocks * array("i").itemsize))
        """By block, how many sequences refer to it."""
        self.free_blocks = deque(range(self.num_blocks))
        self.cached_blocks: OrderedDict[int, None] = OrderedDict()
        """The least recently used first."""
        self.identities: list[Identity | None] = [None] * self.num_blocks
        """By block, under which its content is published, if it is."""
        self.published: dict[Identity, Content] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now: free and cached ones."""
        return len(self.free_blocks) + len(self.cached_blocks)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - self.num_free

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
        blocks = [self.free_blocks.popleft() if self.free_blocks else self._evict() for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
        return blocks

    def _evict(self) -> int:
        block, _ = self.cached_blocks.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        """A block's content is not to be found there any more."""
        identity = self.identities[block]
        assert identity is not None
        copies = self.published[identity].copies
        for blocks in copies:
            blocks.pop(block, None)
        if not any(copies):
            del self.published[identity]
        self.identities[block] = None

    def free(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each of a sequence's `blocks`, given in the order of its tokens.

        A published block that loses its last reference stays cached, unless there is another of its content. The
        end of the sequence is evicted before its beginning, since a block can be found only while all blocks
        before it can.
        Raises `ValueError` for a block that nobody refers to.
        """
        for block in reversed(blocks):
            if self.references[block] == 0:
                raise ValueError(f"block {block} is freed twice")
            self.references[block] -= 1
            if self.references[block] == 0:
                if self._is_spare(block):
                    self._forget(block)
                if self.identities[block] is None:
                    self.free_blocks.append(block)
                else:
                    self.cached_blocks[block] = None

    def _is_spare(self, block: int) -> bool:
        """Whether there is another block of the same content. It has been of use just now, and is kept as long as
        this one would be."""
        identity = self.identities[block]
        if identity is None:
            return False
        blocks = next(blocks for blocks in self.published[identity].copies if block in blocks)
        for other in blocks:
            if other in self.cached_blocks:
                self.cached_blocks.move_to_end(other)
        return len(blocks) > 1

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of `blocks`, which `lookup` has just found."""
        for block in blocks:
            self.references[block] += 1
            self.cached_blocks.pop(block, None)

    def num_free_after_sharing(self, blocks: Iterable[int]) -> int:
        """What `num_free` would be after `share(blocks)`."""
        return self.num_free - sum(1 for block in blocks if self.references[block] == 0)

    def root(self, *parts: str) -> Identity:
        """The parent of first blocks: `parts` name all that the content depends on besides its tokens."""
        return self._digest("\0".join(f"{len(part)}:{part}" for part in parts).encode())

    def publish(self, blocks: Sequence[int], parent: Identity, tokens: Sequence[int]) -> Identity:
        """Make the full blocks that hold `tokens`, one for each group, findable, and return the identity of their
        content, the parent of the next ones.

        `parent` is the identity of the blocks before them, or a root for the first.
        """
        if len(tokens) != self.block_size:
            raise ValueError(f"only full blocks are published: {len(tokens)} tokens, not {self.block_size}")
        identity = self._identity(parent, tokens)
        content = self.published.get(identity)
        if content is None:
            content = self.published[identity] = Content(parent, tuple(tokens), [{} for _ in blocks])
        elif not _is_of(content, parent, tokens):  # two contents of one digest: only the first can be found
            return secrets.token_bytes(16)
        for block, copies in zip(blocks, content.copies, strict=True):
            copies[block] = None
            self.identities[block] = identity
        return identity

    def lookup(self, tokens: Sequence[int], root: Identity, chain: list[Identity] | None = None) -> Prefix:
        """Find the longest published prefix of `tokens` that leaves at least one token to compute.

        Takes no references: call `share` on the blocks before anything is allocated. `chain`: the identities of
        the first blocks of these tokens, as far as they are known; more of them are added to it.
        """
        chain = [] if chain is None else chain
        identities: list[Identity] = []
        contents: list[Content | None] = []
        unbroken = [0] * len(self.behind)  # of each group: how many blocks up to this one are there
        longest = 0
        parent = root
        size = self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            place = len(identities)
            block = tokens[start : start + size]
            if place == len(chain):
                chain.append(self._identity(parent, block))
            content = self._find(chain[place], parent, block)
            parent = chain[place]
            identities.append(parent)
            contents.append(content)
            length = len(identities)
            for group in range(len(unbroken)):
                is_there = content is not None and content.copies[group]
                unbroken[group] = unbroken[group] + 1 if is_there else 0
            if self.behind[0] == ENDLESS and unbroken[0] < length:
                break
            if all(count >= min(behind, length) for count, behind in zip(unbroken, self.behind, strict=True)):
                longest = length
        tables = []
        for group, behind in enumerate(self.behind):
            first = max(0, longest - behind)
            found = (content for content in contents[first:longest] if content is not None)
            tables.append(BlockTable(first, [self._copy(content, group) for content in found]))
        return Prefix(tables, identities[:longest])

    def _find(self, identity: Identity, parent: Identity, tokens: Sequence[int]) -> Content | None:
        """What is known of these tokens after those of `parent`, which `identity` names."""
        content = self.published.get(identity)
        return content if content is not None and _is_of(content, parent, tokens) else None

    def _copy(self, content: Content, group: int) -> int:
        """One of a group's blocks of this content: rather one in use, which takes nothing from what is free."""
        return max(content.copies[group], key=lambda block: self.references[block] > 0)

    def _identity(self, parent: Identity, tokens: Sequence[int]) -> Identity:
        return self._digest(parent + array("q", tokens).tobytes())

    def _digest(self, content: bytes) -> Identity:
        return hashlib.blake2b(content, digest_size=16, key=self._secret).digest()


def _is_of(content: Content, parent: Identity, tokens: Sequence[int]) -> bool:
    return content.parent == parent and content.tokens == tuple(tokens)
