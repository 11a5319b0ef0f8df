from __future__ import annotations

from typing import Any

import pytest
import torch

from scheduler.core.drawing import Truncation
from scheduler.execution.logits import NativeScans, TorchScans
from scheduler.kernels.native import kernels


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1000, 49152])
@pytest.mark.parametrize("threads", [1, 2])
def test_matches_torch(vocabulary: Any, threads: Any) -> None:
    logits = torch.randn(5, vocabulary) * 8
    temperatures = torch.tensor([0.1, 0.7, 1.0, 1.3, 9.0])
    native, plain = NativeScans(threads), TorchScans()
    for ours, theirs in zip(native.best(logits), plain.best(logits), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(native.log_total(logits, temperatures), plain.log_total(logits, temperatures))
    for k in {1, min(50, vocabulary), vocabulary}:
        values, indices = native.top(logits, k)
        assert torch.equal(values, logits.topk(k).values)
        assert torch.equal(logits.gather(-1, indices), values)


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1000, 49152])
def test_draws_where_torch_does(vocabulary: int) -> None:
    logits = torch.randn(200, vocabulary) * 4
    temperatures = torch.rand(200) + 0.5
    numbers = torch.rand(200, dtype=torch.float64)
    ours = NativeScans(2).draw(logits, temperatures, numbers)
    theirs = TorchScans().draw(logits, temperatures, numbers)
    # A number next to an edge between two tokens may fall on either side of it.
    assert (ours == theirs).float().mean() > 0.98
    assert (logits.gather(1, ours[:, None]) > -torch.inf).all()


def kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities [vocabulary], 0 for the tokens that a narrowed choice leaves out, by sorting."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    order = torch.argsort(logits, descending=True, stable=True)
    sorted_ = probabilities[order]
    if 0 < top_k < len(logits):
        sorted_[top_k:] = 0
        sorted_ /= sorted_.sum()
    sorted_[sorted_.cumsum(0) - sorted_ >= top_p] = 0
    sorted_[sorted_ < min_p * sorted_[0]] = 0
    return torch.zeros_like(probabilities).scatter(0, order, sorted_ / sorted_.sum())


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 0.9, 0.0),
        (0, 0.3, 0.1),
        (40, 1.0, 0.0),
        (40, 0.8, 0.0),
        (700, 0.95, 0.0),
        (0, 1.0, 0.3),
        (900, 1.0, 0.05),
    ],
)
def test_narrowed_choices_have_the_right_probabilities(
    scale: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Numbers that fall evenly into 0 to 1 draw each token as often as it is likely, wherever the cut lies."""
    torch.manual_seed(0)
    count, temperature = 20_000, 1.3
    logits = scale * torch.randn(1000)
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    truncation = Truncation(
        torch.full((count,), top_k),
        torch.full((count,), top_p, dtype=torch.float64),
        torch.full((count,), min_p, dtype=torch.float64),
    )
    rows = logits.expand(count, -1).contiguous()
    tokens = NativeScans(2).draw_truncated(rows, torch.full((count,), temperature), numbers, truncation)
    wanted = kept(logits, temperature, top_k, top_p, min_p)
    drawn = torch.bincount(tokens, minlength=1000).double() / count
    # One token at the edge may be let in by one way of rounding and not by another.
    assert ((wanted == 0) != (drawn == 0)).sum() <= 1
    assert (drawn - wanted).abs().max() <= wanted.max() * 0.01 + 3 / count
    assert (logits[tokens].diff() <= 0).all(), "the likeliest first, as in torch"


def test_the_ends_of_the_distribution() -> None:
    logits = torch.full((2, 5000), -torch.inf)
    logits[:, [10, 4000]] = 1.0
    numbers = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert NativeScans(1).draw(logits, torch.ones(2), numbers).tolist() == [10, 4000]


def test_equal_logits_come_in_the_order_of_their_indices() -> None:
    logits = torch.randint(0, 9, (4, 3000)).float()
    assert torch.equal(kernels().argmax(logits)[1], logits.argmax(-1))
    values, indices = kernels().top_candidates(logits, 700)
    expected, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :700])
    assert torch.equal(indices, order[:, :700])


def test_rising_logits_are_the_worst_case() -> None:
    logits = torch.arange(49152.0)[None]
    assert torch.equal(kernels().top_candidates(logits, 40)[1][0], torch.arange(49151, 49111, -1))


def test_masked_logits_and_nan() -> None:
    logits = torch.full((1, 100), -torch.inf)
    assert kernels().top_candidates(logits, 3)[1].tolist() == [[0, 1, 2]]
    assert kernels().logsumexp(logits, torch.ones(1)).tolist() == [-torch.inf]
    logits[0, 70] = 2.0
    assert kernels().argmax(logits)[0].tolist() == [2.0]
    for place in (3, 99):
        broken = logits.clone()
        broken[0, place] = torch.nan
        value, token = kernels().argmax(broken)
        assert value.isnan().all()
        assert token.tolist() == [70]
        assert kernels().logsumexp(broken, torch.ones(1)).tolist() == [2.0]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be"):
        kernels().top_candidates(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="logits must be of dtype float32"):
        kernels().argmax(torch.zeros(1, 4).bfloat16())
