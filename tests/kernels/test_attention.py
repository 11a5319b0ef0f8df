from __future__ import annotations

from typing import Any

import pytest
import torch

from scheduler.kernels.native import kernels
from tests.kernels.paged import attention_oracle, page, random_batch

LENS = [(1, 1), (1, 257), (5, 5), (37, 300), (1, 600), (3, 513)]


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 40}, {"softcap": 3.0}, {"sliding_window": 300, "softcap": 20.0}, {"chunk": 100}],
)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (9, 3), (8, 2), (14, 2), (50, 1)])
def test_matches_torch(heads: Any, kv_heads: Any, head_dim: Any, block_size: Any, options: Any) -> None:
    batch = random_batch(LENS, heads, kv_heads, head_dim, block_size)
    scale = 0.7 * head_dim**-0.5
    out = batch.attend(scale=scale, num_threads=2, **options)
    torch.testing.assert_close(out, attention_oracle(batch, scale, **options), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_cache(dtype: Any) -> None:
    batch = random_batch(LENS, 9, 3, 64, cache=torch.bfloat16, dtype=dtype)
    tolerance = 3e-6 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(
        batch.attend(scale=0.125), attention_oracle(batch, 0.125), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("key_dim, value_dim", [(64, 64), (96, 64), (48, 128), (576, 512)])
@pytest.mark.parametrize("sink", [None, -3.0, 8.0, 200.0])
@pytest.mark.parametrize("slope", [None, 0.25])
def test_sinks_slopes_and_values_of_another_width(key_dim: Any, value_dim: Any, sink: Any, slope: Any) -> None:
    batch = random_batch(LENS, 6, 2, key_dim, value_dim=value_dim)
    scale = key_dim**-0.5
    options: dict[str, Any] = {"sliding_window": 300}
    if sink is not None:
        options["sinks"] = sink + torch.randn(6)
    if slope is not None:
        options["slopes"] = slope * torch.rand(6)
    out = batch.attend(scale=scale, num_threads=2, **options)
    torch.testing.assert_close(out, attention_oracle(batch, scale, **options), atol=3e-6, rtol=2e-5)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, latent_dim", [(2, 16), (9, 64), (16, 96)])
def test_values_that_are_a_part_of_the_keys(cache: Any, heads: Any, latent_dim: Any) -> None:
    batch = random_batch(LENS, heads, 1, 96, cache=cache, latent_dim=latent_dim)
    assert batch.v_cache.numel() == 0
    every: list[dict[str, Any]] = [{}, {"sliding_window": 40}, {"chunk": 100}]
    for options in every:
        out = batch.attend(scale=0.1, num_threads=2, **options)
        torch.testing.assert_close(out, attention_oracle(batch, 0.1, **options), atol=3e-6, rtol=2e-5)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"chunk": 130}])
@pytest.mark.parametrize("kv_heads, latent_dim", [(3, 0), (1, 48)])
def test_a_row_does_not_depend_on_its_company(cache: Any, options: Any, kv_heads: Any, latent_dim: Any) -> None:
    lens = [(1, 700), (30, 900), (1, 33), (4, 3000)]
    batch = random_batch(lens, 9, kv_heads, 64, cache=cache, latent_dim=latent_dim)
    together = batch.attend(scale=0.125, num_threads=2, **options)
    assert torch.equal(together, batch.attend(scale=0.125, num_threads=1, **options))
    for s, context in enumerate(batch.context_lens.tolist()):
        first, last = batch.query_start[s : s + 2].tolist()
        # One query at a time, in other blocks, and with only the context that it sees.
        for row in range(first, last):
            seen = context - (last - 1 - row)
            held = [batch.keys[s][:seen]], [batch.values[s][:seen]]
            alone = page(batch.q[row : row + 1], *held, [1], 32, cache, latent_dim=latent_dim)
            for threads in (1, 2):
                assert torch.equal(alone.attend(scale=0.125, num_threads=threads, **options)[0], together[row])


def test_blocks_out_of_the_window_are_not_read() -> None:
    batch = random_batch([(1, 700)], 4, 2, 64)
    expected = attention_oracle(batch, 0.125, 100)
    batch.block_tables[0, :37] = -1  # 600 tokens out of sight, of which 592 fill whole blocks
    torch.testing.assert_close(batch.attend(scale=0.125, sliding_window=100), expected, atol=3e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="block id -1"):
        batch.attend(scale=0.125, sliding_window=150)


def test_blocks_of_another_chunk_are_not_read() -> None:
    batch = random_batch([(1, 700)], 4, 2, 64)
    expected = attention_oracle(batch, 0.125, chunk=640)
    batch.block_tables[0, :40] = -1
    torch.testing.assert_close(batch.attend(scale=0.125, chunk=640), expected, atol=3e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="block id -1"):
        batch.attend(scale=0.125, chunk=600)


def test_empty_batch_and_idle_sequence() -> None:
    batch = random_batch([(1, 20), (0, 5), (2, 9)], 4, 2, 64)
    torch.testing.assert_close(batch.attend(scale=1.0), attention_oracle(batch, 1.0), atol=3e-6, rtol=1e-5)
    assert random_batch([(0, 5)], 4, 2, 64).attend(scale=1.0).shape == (0, 4, 64)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_write_kv(source: Any, cache: Any) -> None:
    k, v = torch.randn(2, 7, 3, 16).to(source)
    slots = torch.tensor([5, 31, 32, 0, 90, 15, 16])
    k_cache, v_cache = torch.zeros(6, 3, 16, 16, dtype=cache), torch.zeros(6, 3, 16, 16, dtype=cache)
    kernels().write_kv(k, v, slots, k_cache, v_cache)
    for t, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache[slot // 16, :, :, slot % 16], k[t].to(cache))
        assert torch.equal(v_cache[slot // 16, :, slot % 16], v[t].to(cache))
    assert (k_cache != 0).sum() == k.numel()
    assert (v_cache != 0).sum() == v.numel()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.block_tables.fill_(99), "block id 99"),
        (lambda b: b.block_tables.fill_(-1), "block id -1"),
        (lambda b: b.context_lens.fill_(999), "does not fit its block table"),
        (lambda b: b.context_lens.fill_(1), "new tokens but a context"),
        (lambda b: setattr(b, "query_start", torch.tensor([0, 2, 3], dtype=torch.int32)), "rows"),
        (
            lambda b: setattr(b, "query_start", b.query_start.long()),
            "query_start must be of dtype int32, not int64",
        ),
        (lambda b: setattr(b, "q", b.q.transpose(0, 1)), "q must be contiguous"),
        (lambda b: setattr(b, "q", b.q.double()), "float32 or bfloat16"),
        (lambda b: setattr(b, "q", b.q[:, :3].contiguous()), "cannot share"),
        (lambda b: setattr(b, "v_cache", b.k_cache[:3]), "v_cache: dimension 0"),
    ],
)
def test_wrong_input_is_refused(change: Any, message: Any) -> None:
    batch = random_batch([(2, 20), (2, 9)], 4, 2, 32)
    change(batch)
    with pytest.raises(ValueError, match=message):
        batch.attend(scale=1.0)
