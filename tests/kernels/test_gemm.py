from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scheduler.native import kernels

SHAPES = [(16, 16), (32, 64), (33, 20), (96, 7), (5, 3), (960, 576), (576, 1537)]


def rounded(x: Tensor) -> Tensor:
    """Each row as int8 sees it: in groups of 64, 127 steps to the group's largest magnitude."""
    groups = []
    for group in x.split(64, dim=-1):
        step = group.abs().amax(-1, keepdim=True) / 127
        groups.append(torch.where(step > 0, (group * (1 / step)).round(), 0.0) * step)
    return torch.cat(groups, -1)


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    if mode == "int8":
        x, weight = rounded(x), rounded(weight)
    elif mode == "bf16":
        x, weight = x.bfloat16(), weight.bfloat16()
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()


@pytest.mark.parametrize("mode", ["int8", "bf16", "f32"])
@pytest.mark.parametrize("channels, features", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_matches_torch(mode: Any, channels: Any, features: Any, rows: Any, bias: Any) -> None:
    weight, x = torch.randn(channels, features), torch.randn(rows, features)
    b = torch.randn(channels) if bias else None
    y = kernels().PackedLinear(weight, b, mode)(x, num_threads=2)
    expected = oracle(x, weight, b, mode)
    # A value that falls between two int8 steps may round either way.
    tolerance = 2e-2 * features**0.5 * 3 if mode == "int8" else 1e-5 * features**0.5
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=1e-4)


def test_int8_sums_are_exact_at_their_largest() -> None:
    features = 4096
    weight = torch.tensor([[1.0], [-1.0], [0.5]]).expand(3, features).contiguous()
    x = torch.tensor([[1.0], [-1.0]]).expand(2, features).contiguous()
    y = kernels().PackedLinear(weight, None, "int8")(x)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["int8", "bf16", "f32"])
def test_a_row_does_not_depend_on_its_company(mode: Any) -> None:
    linear = kernels().PackedLinear(torch.randn(200, 300), torch.randn(200), mode)
    x = torch.randn(301, 300)
    together = linear(x, num_threads=2)
    assert torch.equal(together, linear(x, num_threads=1))
    for rows in (1, 3, 7, 12, 25, 150):
        assert torch.equal(together[:rows], linear(x[:rows], num_threads=2))
        assert torch.equal(together[-rows:], linear(x[-rows:], num_threads=2))


@pytest.mark.parametrize("mode", ["int8", "bf16", "f32"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("half", [8, 16, 40, 576])
def test_gated(mode: Any, activation: Any, half: Any) -> None:
    weight, bias, x = torch.randn(2 * half, 64), torch.randn(2 * half), torch.randn(9, 64)
    y = kernels().PackedLinear(weight, bias, mode, gated=True)(x, activation=activation)
    gate, partner = kernels().PackedLinear(weight, bias, mode)(x).chunk(2, -1)
    gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(y, gate * partner, atol=1e-5, rtol=1e-5)


def test_bfloat16_tensors_and_extreme_rows() -> None:
    weight, x = torch.randn(48, 64), torch.randn(5, 64)
    linear = kernels().PackedLinear(weight.bfloat16(), None, "bf16")
    assert torch.equal(linear(x.bfloat16()), kernels().PackedLinear(weight, None, "bf16")(x.bfloat16()))
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    zeros = kernels().PackedLinear(weight, None, "int8")(torch.zeros(2, 64))
    assert torch.equal(zeros, torch.zeros(2, 48))
    assert linear(x[:0]).shape == (0, 48)


def test_wrong_input_is_refused() -> None:
    linear = kernels().PackedLinear(torch.randn(48, 64), None, "f32")
    with pytest.raises(ValueError, match="dimension 1 must be 64"):
        linear(torch.randn(2, 63))
    with pytest.raises(ValueError, match="mode must be"):
        kernels().PackedLinear(torch.randn(48, 64), None, "int4")
    with pytest.raises(ValueError, match="bias: dimension 0"):
        kernels().PackedLinear(torch.randn(48, 64), torch.randn(47), "int8")
    with pytest.raises(ValueError, match="even number"):
        kernels().PackedLinear(torch.randn(5, 64), None, "int8", gated=True)
