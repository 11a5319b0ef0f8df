"""Incremental detokenization: never half a character, nothing beyond a stop string, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.text.detokenizer import IncrementalDetokenizer
from scheduler.text.tokenizer import Tokenizer

TEXTS = [
    "Hello, world! It's 12:30.",
    "naïve café — “quoted” … 日本語のテキスト, हिन्दी, עברית",
    "👩‍👩‍👧‍👦 family, 🇪🇺 flag, 👍🏽 thumbs",
    "def f(x):\n\treturn   x  # spaces\n\n\n",
]


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)


def pieces(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    out = [detokenizer.push([token], last=place == len(tokens) - 1) for place, token in enumerate(tokens)]
    return out, detokenizer.stop_reason


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_make_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    out, _ = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    if tokens:
        assert "".join(pieces(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.integers(0, 49151), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_tokens_give_the_text_that_decoding_them_at_once_gives(
    tokenizer: Tokenizer, tokens: list[int]
) -> None:
    assert "".join(pieces(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one two three four", ("three",), "one two "),
        ("one two three four", ("wo th",), "one t"),  # spans tokens
        ("one two three four", ("four", "two"), "one "),  # the first to appear
        ("one two three four", ("five",), None),
        ("aaab", ("aab",), "a"),
        ("end of it\n\nUser:", ("\n\nUser:",), "end of it"),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: tuple[str, ...], left: str | None) -> None:
    out, reason = pieces(tokenizer, tokenizer.encode(text), stop)
    assert "".join(out) == (text if left is None else left)
    assert reason == (None if left is None else text[len(left) :][: len(reason or "")])


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ("<end>",))
    assert detokenizer.push(tokenizer.encode("x <en")) == "x "
    assert detokenizer.push(tokenizer.encode("try")) == "<entry"
    assert detokenizer.stop_reason is None
