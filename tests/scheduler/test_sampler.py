"""The sampler: the right distribution, and the same draw whatever else is in the batch."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from scheduler.core.drawing import SamplingRow, uniform
from scheduler.execution.sampler import sample
from scheduler.sampling_params import SamplingParams

VOCABULARY = 3000


def row(seed: int = 0, index: int = 0, position: int = 0, **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(seed=seed, **params), index, position)


def draw(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    sampled = [token.token_id for token in sample(logits, rows) if token is not None]
    assert len(sampled) == len(rows)
    return sampled


def frequencies(logits: list[float], count: int = 20_000, **params: Any) -> list[float]:
    """How often each token of a small vocabulary is drawn, over many positions of one seeded sequence."""
    tokens = draw(torch.tensor([logits]).expand(count, -1), [row(position=i, **params) for i in range(count)])
    return [share / count for share in np.bincount(tokens, minlength=len(logits)).tolist()]


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw(logits, [row(temperature=0), row(temperature=0)]) == [1, 0]


def test_temperature_one_draws_from_the_softmax() -> None:
    wanted = [0.5, 0.3, 0.15, 0.05]
    assert frequencies([math.log(p) for p in wanted]) == pytest.approx(wanted, abs=0.015)


def test_temperature_flattens() -> None:
    wanted = [4 / 7, 2 / 7, 1 / 7]  # square roots of 16 : 4 : 1
    assert frequencies([math.log(p) for p in (16, 4, 1)], temperature=2.0) == pytest.approx(wanted, abs=0.015)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"top_k": 2}, [0.5 / 0.8, 0.3 / 0.8, 0, 0]),
        ({"top_p": 0.6}, [0.5 / 0.8, 0.3 / 0.8, 0, 0]),
        ({"top_p": 0.45}, [1, 0, 0, 0]),
        ({"min_p": 0.2}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.5 / 0.8, 0.3 / 0.8, 0, 0]),  # 0.8 / 0.95 of what top-k left
    ],
)
def test_truncation(params: dict[str, Any], wanted: list[float]) -> None:
    measured = frequencies([math.log(p) for p in (0.5, 0.3, 0.15, 0.05)], **params)
    assert measured == pytest.approx(wanted, abs=0.015)
    assert [share == 0 for share in measured] == [share == 0 for share in wanted]


def test_truncation_wider_than_the_candidates_uses_the_whole_vocabulary() -> None:
    logits = torch.zeros(
        2000, VOCABULARY
    )  # uniform: the nucleus of 90 % is 2,700 tokens, more than are looked at first
    tokens = draw(logits, [row(position=i, top_p=0.9) for i in range(2000)])
    assert len(set(tokens)) > 1200
    tokens = draw(logits, [row(position=i, top_k=2500) for i in range(2000)])
    assert len(set(tokens)) > 1200


def mixed_rows() -> list[SamplingRow]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 40, "temperature": 1.3},
        {"min_p": 0.05, "top_p": 0.95},
        {"top_p": 0.999, "temperature": 3.0},
    ]
    return [row(seed=i * 7919, index=i % 3, position=i * 5, **kinds[i % len(kinds)]) for i in range(48)]


def test_a_row_draws_the_same_token_alone_and_in_any_company() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(48, VOCABULARY)
    rows = mixed_rows()
    together = draw(logits, rows)
    assert [draw(logits[i : i + 1], [rows[i]])[0] for i in range(48)] == together
    order = random.Random(0).sample(range(48), 48)
    assert draw(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_the_draw_depends_on_seed_index_and_position() -> None:
    rows = [row(seed=s, index=i, position=p) for s in range(10) for i in range(10) for p in range(10)]
    numbers = uniform(rows)
    assert len(set(numbers.tolist())) == 1000
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 0.03


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    (sampled,) = sample(logits, [row(temperature=0, logprobs=2)])
    wanted = torch.log_softmax(logits, dim=-1)[0].tolist()
    assert sampled is not None
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_id == sampled.token_id == 2
    assert sampled.logprobs.logprob == pytest.approx(wanted[2])
    assert [token for token, _ in sampled.logprobs.top] == [2, 3]
    assert [value for _, value in sampled.logprobs.top] == pytest.approx([wanted[2], wanted[3]])


def test_logits_that_are_not_numbers_are_reported_for_their_row_only() -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 2.0], [3.0, 2.0]])
    sampled = sample(logits, [row(temperature=0), row(), row(temperature=0)])
    assert [one and one.token_id for one in sampled] == [1, None, 0]


def test_a_choice_that_is_explained_is_the_choice_that_was_made() -> None:
    torch.manual_seed(2)
    logits = 2 * torch.randn(60, VOCABULARY)
    rows = [SamplingRow(each.params, each.index, each.position) for each in mixed_rows()][: len(logits)]
    wishes = [
        SamplingRow(msgspec.structs.replace(each.params, explain=True), each.index, i)
        for i, each in enumerate(rows)
    ]
    for wish, token in zip(wishes, sample(logits[: len(wishes)].clone(), wishes), strict=True):
        assert token is not None
        assert token.choice is not None
        choice = token.choice
        if choice.number is None:
            assert wish.params.is_greedy
            assert choice.num_candidates == 1
        else:
            assert choice.number == uniform([wish])[0]
            assert choice.low - 1e-6 <= choice.number <= choice.low + choice.probability + 1e-6
