"""The bytes that each token adds to a text. Many tokens are no text by themselves: a part of a character is some
bytes of its UTF-8."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How vocabularies with a fallback to bytes write one."""


class TokenBytes:
    """Of a transformers tokenizer with a backend of the tokenizers package; any other is asked to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = set(tokenizer.get_added_vocab().values())
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self._is_byte_level = "ByteLevel" in decoder
        self._has_fallback = "ByteFallback" in decoder

    def __call__(self, token_id: int) -> bytes:
        """A special token adds none."""
        if token_id in self._special:
            return b""
        return self.literally(token_id)

    def literally(self, token_id: int) -> bytes:
        """A special token's name too."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the model's logits are wider than the vocabulary
            return b""
        if token_id in self._added:
            return str(token).encode()
        if self._is_byte_level and all(character in _bytes_of_characters() for character in token):
            return bytes(_bytes_of_characters()[character] for character in token)
        if self._has_fallback:
            if (byte := _BYTE.fullmatch(token)) is not None:
                return bytes([int(byte[1], 16)])
            return str(token).replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()


@cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet, in which every byte has a character that can be seen: those of Latin-1 that can be stand
    for themselves, and the others, in their order, for what comes after Latin-1."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
