"""What follows the end of a text, as far as the text has said it before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.features.ngram import SIZES, NgramIndex, continuation
from scheduler.features.speculation import Speculation
from scheduler.features.step_cost import StepCost
from scheduler.features.text_drafts import INDEXED_TOKENS, TextDrafts
from tests.scheduler.test_scheduler import make_scheduler, request, run_step

texts = st.lists(st.integers(0, 3), max_size=60)


@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_it_finds_the_latest_occurrence_of_the_longest_end(text: list[int], cuts: list[int]) -> None:
    index = NgramIndex()
    for cut in sorted(cuts):  # however the text grew
        index.extend(text[:cut])
    index.extend(text)
    match = index.match(text)
    found = [
        (size, place)
        for size in SIZES
        for place in range(len(text) - 1, size - 1, -1)
        if text[place - size : place] == text[-size:]
    ]
    assert match == (found[0] if found else None)


@given(text=texts, data=st.data())
def test_texts_with_a_beginning_in_common_share_its_index(text: list[int], data: st.DataObject) -> None:
    base_len = data.draw(st.integers(0, len(text)))
    base, whole = NgramIndex(), NgramIndex()
    shared = NgramIndex(base, base_len)
    while base.num_indexed < base_len:  # a few tokens at a time
        assert base.extend(text[:base_len], 3) <= 3
    shared.extend(text)
    whole.extend(text)
    assert shared.match(text) == whole.match(text)


def test_a_step_takes_in_a_bounded_part_of_long_prompts_and_siblings_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = 0
    extend = NgramIndex.extend

    def counted(self: NgramIndex, tokens: list[int], most: int = 1 << 40) -> int:
        nonlocal taken
        count = extend(self, tokens, most)
        taken += count
        return count

    monkeypatch.setattr(NgramIndex, "extend", counted)
    scheduler = make_scheduler(
        num_blocks=2000, block_size=16, max_num_seqs=64, max_batched_tokens=4000, max_model_len=9000
    )
    scheduler.drafter = Speculation(TextDrafts(StepCost()))
    scheduler.add(request("many", 8000, 40, n=64, ignore_eos=True))
    total = 0
    while scheduler.has_work:
        taken = 0
        run_step(scheduler)
        assert taken <= INDEXED_TOKENS
        total += taken
    assert 8000 <= total <= 8000 + 64 * 40


@given(text=texts.filter(bool), data=st.data(), count=st.integers(1, 30))
def test_what_follows_repeats_beyond_the_end(text: list[int], data: st.DataObject, count: int) -> None:
    place = data.draw(st.integers(0, len(text) - 1))
    longer = list(text)
    for _ in range(count):
        longer.append(longer[place + len(longer) - len(text)])
    assert continuation(text, place, count) == longer[len(text) :]
