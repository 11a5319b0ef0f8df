"""Incremental detokenization: never half a character, nothing beyond a stop string, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from scheduler.core.request import InvalidRequestError
from scheduler.text.detokenizer import IncrementalDetokenizer
from scheduler.text.tokenizer import PIECE, Tokenizer

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


class Counting:
    """A tokenizer that notes how many tokens it was given to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_silent = tokenizer.is_silent
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, **options)


@pytest.mark.parametrize("kind", ["special", "no character", "special within a character"])
def test_tokens_without_text_cost_no_more_than_others(tokenizer: Tokenizer, kind: str) -> None:
    first_of_character = tokenizer.encode("🎠")[0]
    special = tokenizer.encode("<|im_end|>")[0]
    tokens = {
        "special": [special] * 1000,
        "no character": [first_of_character] * 1000,
        "special within a character": [first_of_character, *[special] * 1000],
    }[kind]
    decoder = Counting(tokenizer)
    detokenizer = IncrementalDetokenizer(decoder)
    out = [detokenizer.push([token]) for token in tokens] + [detokenizer.push([], last=True)]
    assert "".join(out) == tokenizer.decode(tokens)
    assert decoder.num_decoded < 100 * len(tokens), "all of them again and again would be 500,000"


@given(tokens=st.lists(st.integers(17, 272), min_size=20, max_size=60))
@settings(max_examples=100, deadline=None)
def test_bytes_at_random_come_out_as_they_are_decoded_at_once(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(pieces(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


def test_a_text_that_cannot_fit_is_not_tokenized_to_its_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = 0
    encode = PreTrainedTokenizerBase.encode

    def counting(theirs: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        ids: list[int] = encode(theirs, text, **options)
        return ids

    monkeypatch.setattr(PreTrainedTokenizerBase, "encode", counting)
    for text in ("word " * 10**6, "word " * 10**5):
        with pytest.raises(InvalidRequestError, match="shorten the prompt"):
            tokenizer.encode(text, longest=8192)
    assert encoded <= 2 * PIECE, "the first not at all"
    book = "word " * 15_000
    assert tokenizer.encode(book, longest=8192) == tokenizer.encode(book), "a few too many are left to the caller"
