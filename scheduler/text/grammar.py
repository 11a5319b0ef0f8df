"""Answers held to a grammar: which tokens may come next, as a bit for each.

The automata are llguidance's; docs/structured-output.md says why. A `GrammarCompiler` belongs to a tokenizer, and
what it makes of a grammar is shared by all answers that are held to it: a `Matcher` is one answer's place in it.

A grammar comes from a client, and there are some that llguidance does not survive. `GrammarChecker` tries each in
a process of its own; only what it lets pass may come here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarSpec
from scheduler.text.grammar_source import compilable, unforced

CACHED_GRAMMARS = 64

STEP_ITEMS = 2_000
"""Of the parser, for one mask: some 15 ms. An ambiguous grammar has more of them with each token; answers that
people ask for have some hundreds."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=STEP_ITEMS,
    max_items_in_row=STEP_ITEMS,
    max_lexer_states=30_000,
    max_grammar_size=20_000,
    verbose_errors=False,
)
"""Of the work for a grammar and for a token. A state of the lexer is about a kilobyte."""

LENGTHS = (6, 8, 10, 12, 16, 30)
_IN_STRING = r'[^"\\\x00-\x1F\x7F]'
SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_IN_STRING}{{1,{length}}}" for length in LENGTHS), f"{_IN_STRING}+"]
"""Tokens that match one of these are let through together where the grammar allows them all; only the others are
looked at one by one. llguidance's own go by 10 and 30 characters of a string, and its masks take half as long
again where a schema bounds a string's length."""


class GrammarError(RuntimeError):
    """Which tokens may come next cannot be told: mostly because that takes more work than a step may have. At
    which of an answer's tokens that is, depends on the grammar and the tokens alone."""


class GrammarCompiler:
    """Compiles grammars for a tokenizer. Its methods may be called from any thread.

    `tokenizer`: the tokenizer as JSON, in the form of Hugging Face's tokenizers. `end_token_ids`: the tokens that
    end an answer, all of which are allowed where the text is complete, and nowhere else.
    """

    def __init__(self, tokenizer: str, end_token_ids: Collection[int]) -> None:
        self._tokenizer = LLTokenizer(tokenizer, eos_token=sorted(end_token_ids) or None, slices=SLICES)
        self._end_token_ids = frozenset(end_token_ids)
        self._compiled: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        """Of the above."""
        self._work = threading.Lock()
        """One grammar at a time."""

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Takes milliseconds for a grammar that was not compiled before, and more for a large one. Raises
        `InvalidRequestError` for a grammar that cannot be compiled."""
        with self._work:
            grammar = self.known(spec)
            if grammar is None:
                grammar = Grammar(self._tokenizer, compilable(spec), self._end_token_ids)
                with self._lock:
                    self._compiled[spec] = grammar
                    if len(self._compiled) > CACHED_GRAMMARS:
                        self._compiled.popitem(last=False)
        return grammar

    def known(self, spec: GrammarSpec) -> Grammar | None:
        """At once: a grammar that was compiled lately."""
        with self._lock:
            grammar = self._compiled.get(spec)
            if grammar is not None:
                self._compiled.move_to_end(spec)
        return grammar


class Grammar:
    """A compiled grammar. Its lexer grows with what has been read, is shared by those who read, and is full at
    some point: then somebody needs a new one."""

    def __init__(self, tokenizer: LLTokenizer, source: str, end_token_ids: frozenset[int]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.end_token_ids = end_token_ids
        self._tokenizer = tokenizer
        self._source = source
        self._beginning = self._compile()

    def matcher(self) -> Matcher:
        """The beginning of an answer."""
        return Matcher(self)

    def begin(self) -> LLMatcher:
        return self._beginning.deep_copy()

    def begin_anew(self) -> LLMatcher:
        """With an empty lexer, which those who begin later share."""
        self._beginning = self._compile()
        return self.begin()

    def stop_forcing(self) -> None:
        """Let the model choose the tokens of a text that the grammar forces. llguidance divides such a text as the
        tokenizer does; where it has the name of a special token (`<think>`), that gives a token that is no
        text."""
        self._source = unforced(self._source)

    def _compile(self) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, self._source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequestError(f"the grammar cannot be compiled: {reason(matcher)}")
        return matcher


class Matcher:
    """One answer's place in its grammar. One thread at a time may use it."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.begin()
        self._end_token_ids = grammar.end_token_ids
        self._token_ids: list[int] = []
        """What was read, without the end token."""
        self._num_ends = 0
        self.num_words = (grammar.vocab_size + 31) // 32
        """Of a mask for the tokenizer's tokens."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow but an end token, or one is there already."""
        return self._num_ends > 0 or self._matcher.is_stopped()

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        """Write which tokens may come next.

        `mask` [words of 32 tokens], contiguous: bit i % 32 of word i // 32 is set where token i may. Rows of
        logits that are no tokens may not. Raises `GrammarError`.
        """
        if self._num_ends:
            self._write_ends(mask)
            return
        words = mask if len(mask) >= self.num_words else np.empty(self.num_words, np.uint32)
        self._recover()
        self._compute(words)
        if self._is_lexer_full():
            self._restart()
            self._compute(words)
        elif self._is_misled(words):
            self._grammar.stop_forcing()
            self._restart()
            self._compute(words)
        self._raise_error()
        if words is mask:
            mask[self.num_words :] = 0
        else:
            mask[:] = words[: len(mask)]

    def advance(self, token_ids: Sequence[int]) -> None:
        """Read tokens. Raises ValueError if one of them may not come where it does, and reads none of them then;
        raises `GrammarError`."""
        for count, token_id in enumerate(token_ids):
            if not self._read(token_id):
                self.rollback(count)
                raise ValueError(f"the grammar does not allow token {token_id} here")

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were read. Raises `GrammarError`."""
        num_ends = min(count, self._num_ends)
        self._num_ends -= num_ends
        if (count := count - num_ends) == 0:
            return
        if count > len(self._token_ids):
            raise ValueError(f"{count} tokens to forget, and {len(self._token_ids)} were read")
        del self._token_ids[-count:]
        if not self._recover():
            self._matcher.rollback(count)
        self._raise_error()

    def forced(self) -> list[int]:
        """The tokens that have to come next whatever the model says, as its tokenizer divides their text; often
        none. The last of them may be missing, if it could be another one."""
        forced = [] if self.is_finished else self._matcher.compute_ff_tokens()
        return forced[: self._matcher.validate_tokens(forced)] if forced else forced

    def _read(self, token_id: int) -> bool:
        if token_id in self._end_token_ids and (self._num_ends or self._matcher.is_accepting()):
            self._num_ends += 1
            return True
        if self.is_finished:
            return False
        self._recover()
        if self._matcher.try_consume_tokens([token_id]) == 0:
            if not self._matcher.is_error():
                return False
            if self._is_lexer_full():
                self._restart()
            if self._matcher.try_consume_tokens([token_id]) == 0:
                self._raise_error()
                return False
        self._token_ids.append(token_id)
        return True

    def _compute(self, words: npt.NDArray[np.uint32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, 4 * self.num_words)

    def _is_misled(self, words: npt.NDArray[np.uint32]) -> bool:
        """Whether the only token that the mask allows is one that cannot be read."""
        words = words[: self.num_words]
        if np.count_nonzero(words) != 1:
            return False
        place = int(words.argmax())
        word = int(words[place])
        token_id = 32 * place + word.bit_length() - 1
        if word & (word - 1) != 0 or (token_id in self._end_token_ids and self._matcher.is_accepting()):
            return False
        return self._matcher.validate_tokens([token_id]) == 0

    def _write_ends(self, mask: npt.NDArray[np.uint32]) -> None:
        mask[:] = 0
        for token_id in self._end_token_ids:
            if token_id < 32 * len(mask):
                mask[token_id // 32] |= np.uint32(1 << token_id % 32)

    def _recover(self) -> bool:
        """After an error at a token that was only guessed: be where the tokens that were read lead to."""
        if not self._matcher.is_error():
            return False
        self._matcher = self._grammar.begin()
        self._matcher.consume_tokens(self._token_ids)
        return True

    def _is_lexer_full(self) -> bool:
        """An error that a new lexer may mend; not that the parser has too much to do."""
        return self._matcher.is_error() and "items" not in self._matcher.get_error()

    def _restart(self) -> None:
        """The lexer may be full of what others have read: read this answer's tokens again with a new one."""
        self._matcher = self._grammar.begin_anew()
        self._matcher.consume_tokens(self._token_ids)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {reason(self._matcher)}")


def reason(matcher: LLMatcher) -> str:
    """What is wrong with it, without the state of automaton and stack."""
    message = matcher.get_error()
    for mark in ("<non-verbose/>", "<state>", "<backtrace>"):
        message = message.partition(mark)[0]
    return {"NoExtensionBias": "no text satisfies it"}.get(message.strip(), message.strip()[:500])
