"""Text to tokens and back, and the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from scheduler.request import InvalidRequestError


class Tokenizer:
    """A transformers tokenizer, reduced to what serving needs. `path`: a folder or a Hugging Face id."""

    def __init__(self, path: str) -> None:
        self._tokenizer = _load(path)
        self.vocab_size: int = len(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text; a token that is part of a character shows as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt for a conversation, ready for the assistant's answer. Raises `InvalidRequestError` if the
        model has no template, or if its template refuses the messages."""
        if not self.has_chat_template:
            raise InvalidRequestError("this model has no chat template: use /v1/completions", "messages")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        assert isinstance(text, str)
        return self.encode(text, add_special_tokens=False)  # the template has put them in


def _load(path: str) -> Any:
    """The fast tokenizer of a folder that has one, without the second and the 300 MB that importing torch takes;
    else whatever transformers finds."""
    if (Path(path) / "tokenizer.json").is_file():
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        config = json.loads((Path(path) / "tokenizer_config.json").read_text())
        if config.get("tokenizer_class") == TokenizersBackend.__name__:
            return TokenizersBackend.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
