from __future__ import annotations

from typing import Any

import pytest
import torch

from scheduler.native import kernels


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1000, 49152])
@pytest.mark.parametrize("threads", [1, 2])
def test_matches_torch(vocabulary: Any, threads: Any) -> None:
    logits = torch.randn(5, vocabulary) * 8
    values, indices = kernels().argmax(logits, num_threads=threads)
    assert torch.equal(indices, logits.argmax(-1))
    assert torch.equal(values, logits.amax(-1))
    torch.testing.assert_close(kernels().logsumexp(logits, num_threads=threads), logits.logsumexp(-1))
    for k in {1, min(50, vocabulary), vocabulary}:
        values, indices = kernels().top_candidates(logits, k, num_threads=threads)
        assert torch.equal(values, logits.topk(k).values)
        assert torch.equal(logits.gather(-1, indices), values)


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


def test_masked_logits() -> None:
    logits = torch.full((1, 100), -torch.inf)
    assert kernels().top_candidates(logits, 3)[1].tolist() == [[0, 1, 2]]
    assert kernels().logsumexp(logits).tolist() == [-torch.inf]
    logits[0, 70] = 2.0
    logits[0, 3] = torch.nan
    assert kernels().argmax(logits)[1].tolist() == [70]
    assert kernels().logsumexp(logits).tolist() == [2.0]
    assert kernels().top_candidates(logits, 2)[1].tolist() == [[70, 0]]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be"):
        kernels().top_candidates(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="logits must be of dtype Float"):
        kernels().argmax(torch.zeros(1, 4).bfloat16())
