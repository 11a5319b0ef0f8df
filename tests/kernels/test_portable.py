"""The same sources built for lesser processors: other code paths, the same results but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scheduler.kernels import native
from scheduler.kernels.library import Product
from tests.kernels.builds import TESTED
from tests.kernels.paged import attention_oracle, random_batch


@pytest.fixture(scope="module", params=TESTED[1:])
def portable(request: pytest.FixtureRequest) -> Any:
    return native.load(request.param)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_attention(portable: Any, head_dim: Any, cache: Any) -> None:
    batch = random_batch([(1, 300), (20, 270), (3, 3)], 9, 3, head_dim, cache=cache)
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.block_tables, batch.query_start, batch.context_lens)
    out = portable.paged_attention(*arguments, scale=0.2, sliding_window=100, softcap=9.0, num_threads=2)
    torch.testing.assert_close(out, attention_oracle(batch, 0.2, 100, 9.0), atol=3e-6, rtol=1e-5)
    alone = portable.paged_attention(
        batch.q[:1], batch.k_cache, batch.v_cache, batch.block_tables[:1], batch.query_start[:2],
        batch.context_lens[:1], scale=0.2, sliding_window=100, softcap=9.0,
    )  # fmt: skip
    assert torch.equal(alone[0], out[0])


def test_elementary_functions(portable: Any) -> None:
    x = torch.linspace(-100, 100, 3201)[:, None]
    for activation, expected in (
        ("silu", torch.nn.functional.silu),
        ("gelu_tanh", lambda t: torch.nn.functional.gelu(t, approximate="tanh")),
    ):
        weights = portable.pack([torch.tensor([[1.0], [0.0]])], torch.tensor([0.0, 1.0]), "f32", gated=True)
        gate = Product(weights)
        torch.testing.assert_close(
            gate(x, activation=activation), expected(x.double()).float(), atol=1e-6, rtol=2e-6
        )
