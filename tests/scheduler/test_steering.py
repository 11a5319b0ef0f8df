"""Penalties, biases and masks: what transformers' logits processors do, or the formulas that OpenAI publishes."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.core.step import ChunkInput
from scheduler.execution.logits import LogitScans, NativeScans, TorchScans
from scheduler.execution.steering import Grammar, Steered, Steering, Steerings, mask_of
from scheduler.sampling_params import SamplingParams

VOCABULARY = 1003
PROMPT = [5, 7, 7, 900, 1002]
ANSWER = [7, 11, 11, 11, 40, 5]
END = 2

SCANS = [NativeScans(2), TorchScans()]


def steering(prompt: list[int] = PROMPT, answer: list[int] = ANSWER, **params: Any) -> Steering:
    one = Steering(SamplingParams(**params), len(prompt), vocab_size=VOCABULARY, end_tokens=[END], matcher=None)
    one.extend(0, [*prompt, *answer])
    return one


def steered(logits: torch.Tensor, scans: LogitScans, one: Steering) -> torch.Tensor:
    """The second of three rows; the others must stay as they are."""
    rows = torch.stack([logits, logits, logits])
    scans.steer(rows, Steered.of([1], one.changes([])))
    assert torch.equal(rows[0], logits)
    assert torch.equal(rows[2], logits)
    return rows[1]


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(VOCABULARY) * 5


@pytest.mark.parametrize("scans", SCANS)
@pytest.mark.parametrize(
    ("params", "processor"),
    [
        ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.7}, RepetitionPenaltyLogitsProcessor(0.7)),
        (
            {"logit_bias": {3: 5.5, 1002: -100.0}},
            SequenceBiasLogitsProcessor([[[3], 5.5], [[1002], -100.0]]),
        ),
        (
            {"bad_words": ((8,), (40, 5, 77), (40, 5), (5, 12, 13), (9, 5, 14))},
            NoBadWordsLogitsProcessor([[8], [40, 5, 77], [40, 5], [5, 12, 13], [9, 5, 14]]),
        ),
        ({"min_tokens": 7}, MinNewTokensLengthLogitsProcessor(len(PROMPT), 7, END)),
        ({"min_tokens": 6}, MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, END)),
        (
            {"repetition_penalty": 1.1, "logit_bias": {7: 2.0}, "min_tokens": 100},
            LogitsProcessorList(
                [
                    RepetitionPenaltyLogitsProcessor(1.1),
                    SequenceBiasLogitsProcessor([[[7], 2.0]]),
                    MinNewTokensLengthLogitsProcessor(len(PROMPT), 100, END),
                ]
            ),
        ),
    ],
)
def test_what_transformers_does(
    logits: torch.Tensor, scans: LogitScans, params: dict[str, Any], processor: Any
) -> None:
    theirs = processor(torch.tensor([[*PROMPT, *ANSWER]]), logits[None].clone())[0]
    torch.testing.assert_close(steered(logits, scans, steering(**params)), theirs)


@pytest.mark.parametrize("scans", SCANS)
def test_presence_and_frequency_are_those_of_the_answer(logits: torch.Tensor, scans: LogitScans) -> None:
    """OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    ours = steered(logits, scans, steering(presence_penalty=0.7, frequency_penalty=-0.3))
    expected = logits.clone()
    for token, count in Counter(ANSWER).items():
        expected[token] += 0.3 * count - 0.7
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scans", SCANS)
def test_only_allowed_tokens_are_left(logits: torch.Tensor, scans: LogitScans) -> None:
    ours = steered(logits, scans, steering(allowed_token_ids=frozenset({0, 31, 32, 1002})))
    left = torch.isfinite(ours)
    assert left.nonzero().flatten().tolist() == [0, 31, 32, 1002]
    assert torch.equal(ours[left], logits[left])


def test_stop_tokens_wait_for_min_tokens_too_and_an_ignored_end_does_not(logits: torch.Tensor) -> None:
    ours = steered(logits, TorchScans(), steering(min_tokens=9, stop_token_ids=frozenset({50})))
    assert torch.isinf(ours).nonzero().flatten().tolist() == [END, 50]
    ours = steered(logits, TorchScans(), steering(min_tokens=9, stop_token_ids=frozenset({50}), ignore_eos=True))
    assert torch.isinf(ours).nonzero().flatten().tolist() == [50]


MANY: dict[str, Any] = {
    "presence_penalty": 1.0,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
    "bad_words": ((3, 4), (1, 2, 3)),
    "min_tokens": 5,
}
TOKENS = st.lists(st.integers(0, 8), max_size=12)


@given(prompt=TOKENS.filter(bool), answer=TOKENS, guessed=TOKENS, cuts=st.lists(st.integers(0, 24), max_size=4))
@settings(max_examples=200, deadline=None)
def test_guesses_and_pieces_change_nothing(
    prompt: list[int], answer: list[int], guessed: list[int], cuts: list[int]
) -> None:
    """However the tokens came, and whatever was guessed in between, the rows are those of the tokens."""

    def same(ours: Any, theirs: Any) -> bool:
        return all(
            dict(zip(*one, strict=True)) == dict(zip(*other, strict=True))
            for one, other in [
                ((ours.seen, ours.times), (theirs.seen, theirs.times)),
                ((ours.biased, ours.biases), (theirs.biased, theirs.biases)),
            ]
        )

    pieces = Steering(SamplingParams(**MANY), len(prompt), vocab_size=10, end_tokens=[END], matcher=None)
    tokens = [*prompt, *answer]
    for start, cut in pairwise([0, *sorted(cuts)]):
        pieces.extend(max(0, start - 1), tokens[max(0, start - 1) : cut])
        if cut >= len(prompt):
            pieces.changes(guessed)
    pieces.extend(0, tokens)
    for place, change in enumerate(pieces.changes(guessed)):
        whole = steering(prompt, [*answer, *guessed[:place]], **MANY)
        assert same(change, whole.changes([])[0])


def test_a_mask_has_a_bit_for_each_token() -> None:
    mask = mask_of({0, 5, 31, 32, 64}, 70)
    assert np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist() == [0, 5, 31, 32, 64]


def test_entries_outside_of_the_logits_are_refused() -> None:
    change = steering(logit_bias={VOCABULARY: 1.0}).changes([])
    with pytest.raises(ValueError, match="is not in"):
        NativeScans(1).steer(torch.zeros(1, VOCABULARY), Steered.of([0], change))


class SlowMatcher:
    """A grammar in which anything goes, after some thought."""

    is_finished = False

    def __init__(self, mask: float, forced: float) -> None:
        self._mask, self._forced = mask, forced

    def fill(self, mask: np.ndarray) -> None:
        think(self._mask)
        mask[:] = 0xFFFFFFFF

    def forced(self) -> list[int]:
        think(self._forced)
        return []

    def advance(self, token_ids: object) -> None: ...

    def rollback(self, count: int) -> None: ...


def think(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_what_a_grammar_takes_is_what_the_costliest_of_its_sequences_takes_with_what_it_forces() -> None:
    """So that a grammar that turns costly for one of 64 answers is costly for all of them in the next step."""
    speeds = iter([(0.02, 0.0), (0.0, 0.03), (0.0, 0.0)])
    steerings = Steerings(VOCABULARY, [END])
    params = SamplingParams(grammar=GrammarSpec(GrammarKind.REGEX, "any"))
    steerings.hold("one", cast(Grammar, SimpleNamespace(matcher=lambda: SlowMatcher(*next(speeds)))))
    chunks = [ChunkInput("one", index, index, 2, [7], 0, True, params, 3, before=[5, 6]) for index in range(3)]
    steerings.steer(chunks)
    for chunk in chunks:
        steerings.forced(chunk, [9])
    assert steerings.seconds["one"] >= 0.05
    steerings.steer([msgspec.structs.replace(chunks[2], start=3, before=None)])
    assert steerings.seconds["one"] < 0.02, "what is over is over"
