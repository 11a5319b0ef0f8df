"""Products over packed weights, in every mode and build: what torch computes from the same rounded numbers."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scheduler.kernels import native
from scheduler.kernels.library import GroupedProduct, Product
from tests.kernels.builds import TESTED

SHAPES = [(16, 16), (33, 20), (96, 7), (5, 3), (960, 576), (576, 1537)]
PLAIN = ["f32", "bf16", "int8", "int4"]
STORED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
GROUPS = {"int8": 64, "int4": 32, "Q6_K": 16}


@pytest.fixture(scope="module", params=TESTED)
def kernels(request: pytest.FixtureRequest) -> Any:
    return native.load(request.param)


def stored_bytes(kind: str, rows: int, columns: int) -> Tensor:
    """A random matrix in one of GGUF's block formats."""
    generator = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        values = generator.standard_normal((rows, columns), dtype=np.float32)
        return torch.from_numpy(gguf.quants.quantize(values, quantization))
    # The library does not write these: random codes, with scales of a sensible size in their places.
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
        scales = generator.uniform(1e-4, 1e-3, data.shape[:2]).astype(np.float16)
        data[..., place : place + 2] = scales[..., None].view(np.uint8)
    return torch.from_numpy(data.reshape(rows, -1))


def make_product(
    kernels: Any, kind: str, channels: int, features: int, bias: Tensor | None = None
) -> tuple[Any, Tensor]:
    """A product, and the weights that it multiplies by."""
    if kind in STORED:
        matrix = kernels.stored(stored_bytes(kind, channels, features), kind)
        return Product(kernels.pack([matrix], bias, "stored")), matrix.dequantize()
    weight = torch.randn(channels, features)
    return Product(kernels.pack([weight], bias, kind)), weight


def rounded(x: Tensor, group: int) -> Tensor:
    """Each row as int8 sees it: in groups, 127 steps to a group's largest magnitude."""
    groups = []
    for part in x.split(group, dim=-1):
        step = part.abs().amax(-1, keepdim=True) / 127
        groups.append(torch.where(step > 0, (part * (1 / step)).round(), 0.0) * step)
    return torch.cat(groups, -1)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("channels, features", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 6, 11, 12, 13, 100])
def test_numbers_match_torch(kernels: Any, kind: Any, channels: Any, features: Any, rows: Any) -> None:
    bias, x = torch.randn(channels), torch.randn(rows, features)
    linear, weight = make_product(kernels, kind, channels, features, bias)
    if kind == "bf16":
        x, weight = x.bfloat16().float(), weight.bfloat16()
    expected = functional.linear(x.double(), weight.double(), bias.double()).float()
    torch.testing.assert_close(linear(x, num_threads=2), expected, atol=1e-5 * features**0.5, rtol=1e-4)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 13, 40])
def test_stored_codes_lose_only_what_rounding_the_rows_loses(kernels: Any, kind: Any, rows: Any) -> None:
    channels, features = 83, 512
    bias, x = torch.randn(channels), torch.randn(rows, features)
    linear, weight = make_product(kernels, kind, channels, features, bias)
    expected = functional.linear(rounded(x, GROUPS.get(kind, 32)).double(), weight.double(), bias.double()).float()
    # A value that falls between two steps may round either way, a step of 1/127 of its group.
    step = x.abs().amax(-1, keepdim=True) / 127 * weight.abs().amax(-1)
    assert ((linear(x, num_threads=2) - expected).abs() <= 2e-5 * expected.abs().max() + 2 * step).all()


@pytest.mark.parametrize("kind, loss", [("int8", 0.012), ("int4", 0.12)])
@pytest.mark.parametrize("channels, features", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_rounded_weights_are_near(
    kernels: Any, kind: Any, loss: Any, channels: Any, features: Any, rows: Any
) -> None:
    x = torch.randn(rows, features)
    linear, weight = make_product(kernels, kind, channels, features)
    expected = x @ weight.T
    error = (linear(x) - expected).norm() / expected.norm()
    assert error < loss * (2 if features < 32 else 1)


def test_a_group_that_four_bits_hold_exactly_is_kept(kernels: Any) -> None:
    codes = torch.randint(0, 16, (40, 96)).float()
    codes.view(40, 3, 32)[..., :2] = torch.tensor([0.0, 15.0])
    weight = codes * 0.25 - 1.5
    x = torch.zeros(1, 96)
    for place in (0, 31, 64, 95):
        x.zero_()[0, place] = 1.0
        linear = Product(kernels.pack([weight], None, "int4"))
        torch.testing.assert_close(linear(x)[0], weight[:, place], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", STORED)
def test_dequantizes_as_gguf_does(kernels: Any, kind: Any) -> None:
    data = stored_bytes(kind, 7, 768)
    expected = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    torch.testing.assert_close(kernels.stored(data, kind).dequantize(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "Q4_0", "Q5_0", "Q8_0"])
def test_sums_are_exact_at_their_largest(kernels: Any, kind: Any) -> None:
    features = 4096
    signs = torch.tensor([[127.0], [-127.0]]).expand(2, features).contiguous()
    if kind == "int8":
        linear = Product(kernels.pack([signs], None, kind))
        weight = signs
    else:
        data = gguf.quants.quantize(signs.numpy(), gguf.GGMLQuantizationType[kind])
        matrix = kernels.stored(torch.from_numpy(data), kind)
        linear, weight = Product(kernels.pack([matrix], None, "stored")), matrix.dequantize()
    torch.testing.assert_close(linear(signs), signs @ weight.T, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", [*PLAIN, *STORED])
def test_a_row_does_not_depend_on_its_company(kernels: Any, kind: Any) -> None:
    linear, _ = make_product(kernels, kind, 200, 512 if kind in STORED else 300, torch.randn(200))
    x = torch.randn(301, 512 if kind in STORED else 300)
    together = linear(x, num_threads=2)
    assert torch.equal(together, linear(x, num_threads=1))
    for rows in (1, 3, 5, 7, 12, 25, 150):
        assert torch.equal(together[:rows], linear(x[:rows], num_threads=2))
        assert torch.equal(together[-rows:], linear(x[-rows:], num_threads=2))


@pytest.mark.parametrize("kind", [*PLAIN, "Q4_1", "Q6_K"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("half", [8, 40, 576])
def test_gated(kernels: Any, kind: Any, activation: Any, half: Any) -> None:
    features = 256
    bias, x = torch.randn(2 * half), torch.randn(9, features)
    if kind in STORED:
        data = stored_bytes(kind, 2 * half, features)
        parts, mode = [kernels.stored(part, kind) for part in data.chunk(2)], "stored"
    else:
        parts, mode = list(torch.randn(2 * half, features).chunk(2)), kind
    y = Product(kernels.pack(parts, bias, mode, gated=True))(x, activation=activation)
    gate, partner = Product(kernels.pack(parts, bias, mode))(x).chunk(2, -1)
    gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(y, gate * partner, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["f32", "bf16", "int8"])
def test_stored_weights_can_be_multiplied_in_other_modes(kernels: Any, mode: Any) -> None:
    matrix = kernels.stored(stored_bytes("Q4_1", 40, 128), "Q4_1")
    x = torch.randn(3, 128)
    from_stored = Product(kernels.pack([matrix], None, mode))(x)
    from_values = Product(kernels.pack([matrix.dequantize()], None, mode))(x)
    assert torch.equal(from_stored, from_values)


def test_bfloat16_tensors_and_extreme_rows(kernels: Any) -> None:
    weight, x = torch.randn(48, 64), torch.randn(5, 64)
    linear = Product(kernels.pack([weight.bfloat16()], None, "bf16"))
    same = Product(kernels.pack([weight], None, "bf16"))
    assert torch.equal(linear(x.bfloat16()), same(x.bfloat16()))
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    zeros = Product(kernels.pack([weight], None, "int8"))(torch.zeros(2, 64))
    assert torch.equal(zeros, torch.zeros(2, 48))
    assert linear(x[:0]).shape == (0, 48)


def test_wrong_input_is_refused(kernels: Any) -> None:
    linear = Product(kernels.pack([torch.randn(48, 64)], None, "f32"))
    with pytest.raises(ValueError, match="dimension 1 must be 64"):
        linear(torch.randn(2, 63))
    with pytest.raises(ValueError, match="mode must be"):
        kernels.pack([torch.randn(48, 64)], None, "int3")
    with pytest.raises(ValueError, match="bias: dimension 0"):
        kernels.pack([torch.randn(48, 64)], torch.randn(47), "int8")
    with pytest.raises(ValueError, match="even number"):
        kernels.pack([torch.randn(5, 64)], None, "int8", gated=True)
    with pytest.raises(ValueError, match="no stored codes"):
        kernels.pack([torch.randn(5, 64)], None, "stored")
    with pytest.raises(ValueError, match="Q6_K, not Q2_K"):
        kernels.stored(torch.zeros(2, 84, dtype=torch.uint8), "Q2_K")
    with pytest.raises(ValueError, match="must be uint8"):
        kernels.stored(torch.zeros(2, 18), "Q4_0")
    with pytest.raises(ValueError, match="must be float32 or bfloat16, not uint8"):
        kernels.pack([torch.zeros(2, 64, dtype=torch.uint8)], None, "f32")
    with pytest.raises(ValueError, match="whole blocks"):
        kernels.stored(torch.zeros(2, 19, dtype=torch.uint8), "Q4_0")


@pytest.mark.parametrize("kind", PLAIN)
def test_groups_of_rows_have_weights_of_their_own(kernels: Any, kind: Any) -> None:
    sizes, features = [3, 0, 30, 1, 13], 70
    made = [torch.randn(50, features) for _ in sizes]
    biases = [torch.randn(50) for _ in sizes]
    packed = [kernels.pack([weight], bias, kind) for weight, bias in zip(made, biases, strict=True)]
    x = torch.randn(sum(sizes), features)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    together = GroupedProduct(packed)(x, starts, num_threads=2)
    for group, weights in enumerate(packed):
        rows = x[starts[group] : starts[group + 1]]
        alone = Product(weights)(rows)
        assert torch.equal(together[starts[group] : starts[group + 1]], alone)
    assert GroupedProduct(packed).nbytes == sum(weights.nbytes for weights in packed)


def test_wrong_groups_are_refused(kernels: Any) -> None:
    def weights(channels: int, mode: str = "f32") -> Any:
        return kernels.pack([torch.randn(channels, 16)], None, mode)

    for parts in ([], [weights(8), weights(9)], [weights(8), weights(8, "int8")]):
        with pytest.raises(ValueError, match="weights"):
            GroupedProduct(parts)
    product = GroupedProduct([weights(8), weights(8)])
    for starts in ([0, 5], [0, 3, 4], [1, 3, 5], [0, 6, 5]):
        with pytest.raises(ValueError, match="starts"):
            product(torch.randn(5, 16), starts)
