"""A NaN reaches everybody who depends on it, and nobody else, in every build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scheduler.kernels import native
from scheduler.kernels.library import Product
from tests.kernels.builds import TESTED
from tests.kernels.paged import Batch, random_batch
from tests.kernels.test_gemm import STORED, make_product

CODED = ["int8", "int4", *STORED]


@pytest.fixture(scope="module", params=TESTED)
def kernels(request: pytest.FixtureRequest) -> Any:
    return native.load(request.param)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", CODED)
def test_a_row_that_is_not_finite_says_so(kernels: Any, kind: str, value: float) -> None:
    linear, _ = make_product(kernels, kind, 48, 512)
    x = torch.randn(5, 512)
    expected = linear(x)
    for place in (0, 17, 511):
        broken = x.clone()
        broken[2, place] = value
        out = linear(broken)
        assert out[2].isnan().all()
        others = [0, 1, 3, 4]
        assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("features", [20, 64, 100])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_weight_that_is_not_finite_says_so(kernels: Any, kind: str, features: int) -> None:
    weight, x = torch.randn(48, features), torch.randn(3, features)
    expected = Product(kernels.pack([weight], None, kind))(x)
    weight[7, features - 1] = torch.nan
    weight[11, 3] = torch.inf
    out = Product(kernels.pack([weight], None, kind))(x)
    assert out[:, [7, 11]].isnan().all()
    sound = [channel for channel in range(48) if channel not in (7, 11)]
    assert torch.equal(out[:, sound], expected[:, sound])


def test_a_row_next_to_zero_is_zero(kernels: Any) -> None:
    linear, _ = make_product(kernels, "int8", 48, 64)
    assert torch.equal(linear(torch.full((1, 64), 1e-40)), torch.zeros(1, 48))


def attend(kernels: Any, batch: Batch, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Tensor:
    out: Tensor = kernels.paged_attention(
        batch.q,
        k_cache,
        v_cache,
        batch.block_tables,
        batch.query_start,
        batch.context_lens,
        scale=0.125,
        **options,
    )
    return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"softcap": 3.0}, {"slopes": torch.rand(6)}])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_what_free_slots_hold_reaches_nobody(
    kernels: Any, cache: torch.dtype, options: dict[str, Any], threads: int
) -> None:
    batch = random_batch([(1, 1), (1, 257), (37, 300), (1, 601), (3, 513)], 6, 2, 64, cache=cache)
    clean = attend(
        kernels, batch, batch.k_cache.nan_to_num(), batch.v_cache.nan_to_num(), num_threads=threads, **options
    )
    assert batch.k_cache.isnan().any()
    assert clean.isfinite().all()
    for stale in (torch.nan, torch.inf, -torch.inf):
        keys = batch.k_cache.where(~batch.k_cache.isnan(), stale)
        values = batch.v_cache.where(~batch.v_cache.isnan(), stale)
        assert torch.equal(attend(kernels, batch, keys, values, num_threads=threads, **options), clean)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_query_sees_that_keys_are_not_numbers(kernels: Any, threads: int) -> None:
    """Even where it sees nothing else of a partition of the context, and its neighbour in the tile does."""
    batch = random_batch([(2, 273), (1, 600)], 6, 2, 64)
    keys = batch.k_cache.clone()
    keys[batch.block_tables[0, 16]] = torch.nan  # tokens 256 to 271; the queries are 271 and 272
    out = attend(kernels, batch, keys, batch.v_cache, num_threads=threads)
    assert out[:2].isnan().all()
    assert torch.equal(out[2], attend(kernels, batch, batch.k_cache, batch.v_cache)[2])
