"""From tokens to text as they come: never half a character, and never beyond a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"


MAX_PENDING = 8
"""Tokens whose text is held back. A character has four bytes at most, so of more only the last ones are needed."""


LONGEST_CHARACTER = 4
"""In bytes."""

PROMPT_TAIL = 4
"""Tokens of a prompt on which the text of what follows can depend."""


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], **options: bool) -> str: ...

    def is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out, wherever it stands."""


@dataclass(frozen=True, slots=True)
class SpecialTokensShown:
    """A decoder that leaves nothing out."""

    decoder: Decoder
    spaces_between: bool

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return self.decoder.decode(
            token_ids, skip_special_tokens=False, spaces_between_special_tokens=self.spaces_between
        )

    def is_silent(self, token_id: int) -> bool:
        return False


def decoder_for(decoder: Decoder, *, skip_special_tokens: bool, spaces_between: bool) -> Decoder:
    """What shows special tokens, or leaves them out."""
    return decoder if skip_special_tokens else SpecialTokensShown(decoder, spaces_between)


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text, piece by piece.

    Each piece is the difference between decoding a short window of tokens with and without the new ones, since a
    token's text can depend on the one before it. A window that ends in U+FFFD may end within a character and is
    held back, as far as it may. Text that could still become a stop string is held back too.

    The text of an answer is that of `prompt` and answer without that of the prompt: a tokenizer may leave out the
    space with which a text begins, and an answer is not where one begins.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        include_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._longest_stop = max((len(string) for string in self._stop), default=1)
        self._tokens = self._tail(prompt)
        self._window_start = 0
        self._emitted = len(self._tokens)  # tokens whose text is out
        self._held_back = ""
        self.stop_reason: str | None = None
        """The stop string that was met."""

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from where a character begins: where one of several bytes is cut, nothing is
        left of those beside it. Nothing of a prompt that ends within a character: that is none yet."""
        for length in range(PROMPT_TAIL, PROMPT_TAIL + LONGEST_CHARACTER):
            tail = [token_id for token_id in prompt[-length:] if not self._decoder.is_silent(token_id)]
            if not self._decoder.decode(tail).endswith(REPLACEMENT):
                return tail
        return []

    def push(self, token_ids: Sequence[int], *, last: bool = False, match_stop: bool = True) -> str:
        """Take new tokens, return the text that is now certain. `last`: nothing follows, so hold nothing back.

        When a stop string appears, `stop_reason` is set, the text ends before it (or with it, if that was asked
        for), and later tokens are ignored.
        """
        if self.stop_reason is not None:
            return ""
        self._tokens += [token_id for token_id in token_ids if not self._decoder.is_silent(token_id)]
        text = self._held_back + self._decode_new(last)
        self._held_back = ""
        if not self._stop:
            return text
        if match_stop:
            found = [(place, string) for string in self._stop if (place := text.find(string)) >= 0]
            if found:
                place, self.stop_reason = min(found)
                return text[: place + len(self.stop_reason)] if self._include_stop else text[:place]
        if last:
            return text
        keep = self._possible_stop(text)
        self._held_back = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode_new(self, last: bool) -> str:
        before = self._decoder.decode(self._tokens[self._window_start : self._emitted])
        whole = self._decoder.decode(self._tokens[self._window_start :])
        end = len(self._tokens)
        if whole.endswith(REPLACEMENT) and not last:
            if end - self._emitted <= MAX_PENDING:
                return ""
            end, whole = self._certain(whole)
        if len(whole) <= len(before):
            return ""
        self._window_start, self._emitted = self._emitted, end
        return whole[len(before) :]

    def _certain(self, whole: str) -> tuple[int, str]:
        """Of a window that ends in U+FFFD, whose text is `whole`: the end of the tokens before that, and their
        text. Tokens that are bytes are no text together until the last one has come, so what ends with a whole
        character comes first."""
        ends = range(len(self._tokens) - 1, self._emitted, -1)
        texts = [(end, self._decoder.decode(self._tokens[self._window_start : end])) for end in ends]
        for end, text in texts:
            if not text.endswith(REPLACEMENT):
                return end, text
        for end, text in texts:
            if whole[:-1].startswith(text):
                return end, text
        return self._emitted, ""

    def _possible_stop(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._stop):
                return length
        return 0
