"""Texts drawn at random from what a grammar allows."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from scheduler.text.grammar import Matcher
from scheduler.text.tokenizer import Tokenizer

ENDS = (2, 0)
"""The default model's <|im_end|> and <|endoftext|>."""

CLOSING = ['"', "}", "]", '"}', '"]', "1", "true", "null", ",", ":"]


def filled(matcher: Matcher) -> npt.NDArray[np.uint32]:
    mask = np.full(matcher.num_words, 0xFFFFFFFF, np.uint32)
    matcher.fill(mask)
    return mask


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(filled(matcher).view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def walk(matcher: Matcher, tokenizer: Tokenizer, rng: random.Random, longest: int = 300) -> list[int] | None:
    """The tokens of a random text, which is brought to an end after a while; None if that takes too long."""
    closing = {
        tokens[0] for text in CLOSING if len(tokens := tokenizer.encode(text, add_special_tokens=False)) == 1
    }
    drawn: list[int] = []
    while len(drawn) < longest:
        options = allowed(matcher)
        assert options
        if matcher.is_finished or (ENDS[0] in options and rng.random() < 0.5):
            return drawn
        options = [token for token in options if token not in ENDS] or options
        short = [token for token in options if token in closing]
        token = rng.choice(short if short and rng.random() < (0.4 if len(drawn) < 60 else 0.95) else options)
        matcher.advance([token])
        drawn.append(token)
    return None
