"""The block pool: allocation, sharing, and the prefix cache."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from scheduler.core.blocks import BlockPool, Identity, NoFreeBlocksError


def publish_all(pool: BlockPool, blocks: list[int], tokens: list[int], salt: str = "") -> list[Identity]:
    """Publish every full block of `tokens`, as the scheduler does after computing them."""
    identities: list[Identity] = []
    for index in range(len(tokens) // pool.block_size):
        parent = identities[-1] if identities else pool.root(salt)
        part = tokens[index * pool.block_size : (index + 1) * pool.block_size]
        identities.append(pool.publish(blocks[index : index + 1], parent, part))
    return identities


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    first = pool.allocate(3)
    with pytest.raises(NoFreeBlocksError, match="2 blocks asked for, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.free(first)
    assert pool.num_free == 4


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)


def test_a_common_prefix_is_shared() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    blocks = pool.allocate(3)
    publish_all(pool, blocks, [1, 2, 3, 4, 5])

    prefix = pool.lookup([1, 2, 3, 4, 9, 9], pool.root(""))
    assert prefix.blocks == blocks[:2]
    pool.share(prefix.blocks)
    assert [pool.references[block] for block in blocks] == [2, 2, 1]


def test_a_prefix_always_leaves_a_token_to_compute() -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    blocks = pool.allocate(2)
    publish_all(pool, blocks, [1, 2, 3, 4])
    assert pool.lookup([1, 2, 3, 4], pool.root("")).blocks == blocks[:1]
    assert pool.lookup([1, 2, 3, 4, 5], pool.root("")).blocks == blocks


def test_a_freed_published_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    blocks = pool.allocate(2)
    publish_all(pool, blocks, [1, 2, 3, 4])
    pool.free(blocks)
    assert pool.num_used == 0
    assert pool.lookup([1, 2, 3, 4, 5], pool.root("")).blocks == blocks

    pool.allocate(1)  # evicts the end of the sequence first: its beginning can still be found
    assert pool.lookup([1, 2, 3, 4, 5], pool.root("")).blocks == blocks[:1]


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=3, block_size=1)
    blocks = pool.allocate(3)
    for block, token in zip(blocks, [10, 20, 30], strict=True):
        pool.publish([block], pool.root(""), [token])
        pool.free([block])
    pool.share([blocks[0]])  # used again, so now the most recent
    pool.free([blocks[0]])
    pool.allocate(2)
    assert pool.lookup([10, 0], pool.root("")).blocks == [blocks[0]]
    assert pool.lookup([20, 0], pool.root("")).blocks == []
    assert pool.lookup([30, 0], pool.root("")).blocks == []


def test_equal_tokens_after_different_prefixes_are_different_content() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    publish_all(pool, pool.allocate(2), [1, 1, 7, 7])
    publish_all(pool, pool.allocate(1), [2, 2])
    assert len(pool.lookup([2, 2, 7, 7, 0], pool.root("")).blocks) == 1


def test_prefixes_are_shared_only_within_a_salt() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    publish_all(pool, pool.allocate(1), [1, 2], salt="adapter-a")
    assert pool.lookup([1, 2, 3], pool.root("adapter-b")).blocks == []
    assert len(pool.lookup([1, 2, 3], pool.root("adapter-a")).blocks) == 1


def test_a_digest_collision_does_not_return_wrong_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "_digest", lambda self, content: b"always the same.")
    pool = BlockPool(num_blocks=8, block_size=2)
    blocks = pool.allocate(2)
    publish_all(pool, blocks, [1, 2, 3, 4])
    assert pool.lookup([5, 6, 3, 4, 9], pool.root("")).blocks == []
    assert pool.lookup([1, 2, 5, 6, 9], pool.root("")).blocks == blocks[:1]


def test_every_copy_of_a_content_can_be_found() -> None:
    """Two sequences that computed the same at the same time: what the first loses, the second still has."""
    pool = BlockPool(num_blocks=6, block_size=2)
    first, second = pool.allocate(2), pool.allocate(3)
    publish_all(pool, first, [1, 2, 3, 4])
    publish_all(pool, second, [1, 2, 3, 4, 5, 6])
    pool.free(first)
    pool.allocate(3)  # evicts all of the first's
    assert pool.lookup([1, 2, 3, 4, 5, 6, 7], pool.root("")).blocks == second


def test_only_full_blocks_are_published() -> None:
    pool = BlockPool(num_blocks=1, block_size=4)
    with pytest.raises(ValueError, match="only full blocks"):
        pool.publish(pool.allocate(1), pool.root(""), [1, 2])


def test_a_prefix_needs_of_a_window_only_the_blocks_that_it_still_sees() -> None:
    pool = BlockPool(num_blocks=20, block_size=2, windows=(None, 4))
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    full, window = pool.allocate(5), pool.allocate(5)
    parent = pool.root("")
    for place in range(5):
        parent = pool.publish([full[place], window[place]], parent, tokens[2 * place : 2 * place + 2])
    pool.free(window[:3])  # the first to be evicted
    pool.allocate(13)
    found = pool.lookup([*tokens, 11], pool.root(""))
    assert [(table.first, table.blocks) for table in found.tables] == [(0, full), (3, window[3:])]
    assert len(found.identities) == 5
    # A shorter one would need what is gone, and so would a longer one if there were a gap.
    assert pool.lookup(tokens[:9], pool.root("")).blocks == []


def test_where_all_layers_have_a_window_a_prefix_may_begin_with_a_gap() -> None:
    pool = BlockPool(num_blocks=4, block_size=2, windows=(3,))
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    blocks = pool.allocate(4)
    publish_all(pool, blocks, tokens)
    pool.free(blocks[1:2])
    pool.allocate(1)
    found = pool.lookup([*tokens, 9], pool.root(""))
    assert [(table.first, table.blocks) for table in found.tables] == [(3, blocks[3:])]
    assert (
        pool.lookup(tokens[:5], pool.root("")).blocks == blocks[:1]
    )  # two blocks would need the one that is gone


class BlockPoolMachine(RuleBasedStateMachine):
    """Random sequences come, share prefixes, grow, publish and go. The model keeps, for every block, who holds
    it and what was written to it; the pool must agree with it at every moment."""

    sequences: Bundle[tuple[list[int], list[int]]] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=12, block_size=2)
        self.holders = [0] * 12
        self.content: list[tuple[int, ...] | None] = [None] * 12  # all tokens up to and with this block

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=13))
    def arrive(self, tokens: list[int]) -> Any:
        prefix = self.pool.lookup(tokens, self.pool.root(""))
        size = self.pool.block_size
        for place, block in enumerate(prefix.blocks):
            assert self.content[block] == tuple(tokens[: (place + 1) * size]), "the cache returned wrong content"
        missing = self.pool.blocks_for(len(tokens)) - len(prefix.blocks)
        if missing > self.pool.num_free_after_sharing(prefix.blocks):
            return multiple()
        self.pool.share(prefix.blocks)
        fresh = self.pool.allocate(missing)
        for block in fresh:
            assert self.holders[block] == 0, "a block that is in use was handed out"
            self.content[block] = None
        blocks = prefix.blocks + fresh
        for block in blocks:
            self.holders[block] += 1
        for place in range(len(prefix.blocks), len(tokens) // size):
            assert self.holders[blocks[place]] == 1, "a shared block would be written"
            self.content[blocks[place]] = tuple(tokens[: (place + 1) * size])
        publish_all(self.pool, blocks, tokens)
        return (blocks, tokens)

    @rule(sequence=consumes(sequences))
    def leave(self, sequence: tuple[list[int], list[int]]) -> None:
        blocks, _ = sequence
        self.pool.free(blocks)
        for block in blocks:
            self.holders[block] -= 1

    @invariant()
    def agrees(self) -> None:
        assert [self.pool.references[block] for block in range(12)] == self.holders
        assert self.pool.num_used == sum(1 for count in self.holders if count > 0)
        assert self.pool.num_used + self.pool.num_free == self.pool.num_blocks


TestBlockPoolStates = BlockPoolMachine.TestCase
TestBlockPoolStates.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
