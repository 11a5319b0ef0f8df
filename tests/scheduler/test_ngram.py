"""What follows the end of a text, as far as the text has said it before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.planning.ngram import SIZES, NgramIndex, continuation

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


@given(text=texts.filter(bool), data=st.data(), count=st.integers(1, 30))
def test_what_follows_repeats_beyond_the_end(text: list[int], data: st.DataObject, count: int) -> None:
    place = data.draw(st.integers(0, len(text) - 1))
    longer = list(text)
    for _ in range(count):
        longer.append(longer[place + len(longer) - len(text)])
    assert continuation(text, place, count) == longer[len(text) :]
