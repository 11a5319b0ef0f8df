"""Text to tokens and back, and the model's chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from scheduler.core.request import InvalidRequestError
from scheduler.fitting import PromptTooLongError
from scheduler.shared_thread import give_way
from scheduler.text.chat_template import ChatTemplate
from scheduler.text.token_bytes import TokenBytes

MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)
"""What families call the tokens before a prefix, before a suffix, and before what is between them (Bavarian et
al., arXiv 2207.14255; the order is prefix, suffix, middle)."""

PIECE = 64 * 1024
"""Characters from which a text's length is looked at before it is tokenized in one go."""


class Tokenizer:
    """A transformers tokenizer, reduced to what serving needs. `path`: a folder.
    `chat_template` takes the place of the model's own."""

    def __init__(
        self, path: str, *, chat_template: str | None = None, special_tokens_in_text: bool = False
    ) -> None:
        self._tokenizer = _load(path)
        self.chat_template = ChatTemplate(self._tokenizer, chat_template, special_in_text=special_tokens_in_text)
        self.vocab_size: int = len(self._tokenizer)
        self.longest_token: int = max(map(len, self._tokenizer.get_vocab()))
        """Characters of the longest token, or a few more: some tokenizers write a byte as one character."""
        token_bytes = TokenBytes(self._tokenizer)
        # A vocabulary is small, and a step asks for some hundreds of its tokens.
        self.token_bytes = cache(token_bytes)
        self.token_text = cache(lambda token_id: _text_of(token_bytes.literally(token_id)))
        """What a token is called: its text, or its bytes where they are not text by themselves."""
        self.is_silent = cache(self._is_silent)
        self.control_tokens = cache(self._control_tokens)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, longest: int | None = None, cut: bool = False
    ) -> list[int]:
        """Raises `InvalidRequestError` for a text of far more than `longest` tokens, with most of it untouched. A
        few too many are the caller's business. `cut`: the caller keeps a part of it, so that only its characters
        are looked at."""
        if len(text) > PIECE // 8:
            give_way()
        if longest is not None:
            self.check_length(len(text), longest)
            if not cut and len(text) > max(PIECE, 2 * longest):
                self._check_pieces(text, longest)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def check_length(self, num_characters: int, longest: int) -> None:
        """Raise `InvalidRequestError` for a text of more characters than so many of the longest tokens have."""
        if num_characters > longest * self.longest_token:
            raise _too_long(f"{num_characters} characters", longest + 1, longest)

    def _check_pieces(self, text: str, longest: int) -> None:
        """Count tokens piece by piece, no further than to twice too many: the cuts make some more of them."""
        num_tokens = 0
        for start in range(0, len(text), PIECE):
            num_tokens += len(self.encode(text[start : start + PIECE], add_special_tokens=False))
            if num_tokens > 2 * longest:
                raise _too_long(f"{len(text)} characters, more than {longest} tokens", num_tokens, longest)

    def fill_in_the_middle(self, prefix: str, suffix: str, *, longest: int | None = None) -> list[int]:
        """The prompt for the text between two. Raises `InvalidRequestError` if the model has no tokens for it."""
        vocabulary = self._tokenizer.get_vocab()
        for names in MIDDLE:
            if all(name in vocabulary for name in names):
                before, after, middle = (vocabulary[name] for name in names)
                of_prefix = self.encode(prefix, add_special_tokens=False, longest=longest)
                of_suffix = self.encode(suffix, add_special_tokens=False, longest=longest)
                return [before, *of_prefix, after, *of_suffix, middle]
        raise InvalidRequestError(
            "this model has no tokens to fill in the middle: suffix is not possible", "suffix"
        )

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        """`options`: skip_special_tokens and spaces_between_special_tokens, as transformers has them."""
        options = {"skip_special_tokens": True} | options
        text = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False, **options)
        assert isinstance(text, str)
        return text

    def phrases(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each word, as it begins a text and as it follows a space."""
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        return tuple(dict.fromkeys(tuple(self.encode(text, add_special_tokens=False)) for text in texts))

    def _is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out, wherever it stands. (Twice: alone, a space may be left out.)"""
        return self.decode([token_id, token_id]) == ""

    def definition(self) -> str:
        """The tokenizer as JSON, in the form of Hugging Face's tokenizers. Raises `InvalidRequestError` for a
        tokenizer of another kind, which has none."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidRequestError("this model's tokenizer is of a kind that cannot be held to a grammar")
        if backend.padding is not None or backend.truncation is not None:
            backend = copy.copy(backend)  # takes three times as long as all the rest
            backend.no_padding()
            backend.no_truncation()
        text: str = backend.to_str()
        return text

    def _control_tokens(self) -> dict[str, int]:
        """The tokens that are no text in a grammar, and that it has to name by their ids: special ones, and any
        that was added in angle brackets (that is llguidance's rule)."""
        return {
            token.content: token_id
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }

    def description(self) -> dict[str, Any]:
        """What a tokenizer_config.json says of it."""
        tokenizer = self._tokenizer
        added = {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        }
        special = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **special,
            "added_tokens_decoder": added,
            "chat_template": self.chat_template.source,
        }

    @property
    def has_response_template(self) -> bool:
        """Whether it says itself how answers are read."""
        return getattr(self._tokenizer, "response_template", None) is not None

    def response_parser(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> Any:
        """transformers' parser of an answer, by the response template."""
        prefix = self.decode(prompt, skip_special_tokens=False)
        return self._tokenizer.get_response_parser(prefix=prefix, tools=list(tools))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        longest: int | None = None,
        cut: bool = False,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[int]:
        """The prompt for a conversation; `options` as `ChatTemplate.tokens` has them. By default the template
        puts in what special tokens there are. Raises `InvalidRequestError` as that does, or as `encode` does."""
        if longest is not None:
            self.check_length(sum(len(message["content"]) for message in messages), longest)
        rendered = self.chat_template.tokens(messages, **options)
        if isinstance(rendered, str):
            return self.encode(rendered, add_special_tokens, longest=longest, cut=cut)
        return rendered


def _text_of(in_bytes: bytes) -> str:
    """Text, or what OpenAI calls bytes that are none."""
    try:
        return in_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in in_bytes)


def _too_long(length: str, num_tokens: int, longest: int) -> PromptTooLongError:
    return PromptTooLongError(
        f"This model's maximum context length is {longest} tokens. However, the prompt has {length}: shorten the "
        "prompt.",
        num_tokens,
        longest,
    )


class TokenizerError(OSError):
    """There is no tokenizer, or none that can be read; the message is for the user."""


def _load(path: str) -> Any:
    """Raises `TokenizerError`."""
    try:
        return _read(Path(path))
    except Exception as error:  # transformers says in many ways that there is none
        said = " ".join(str(error).split())[:300]
        raise TokenizerError(
            f"no tokenizer can be read from {path} (tokenizer.json and tokenizer_config.json, or what "
            f"transformers makes them of): {said}"
        ) from error


def _read(folder: Path) -> Any:
    """The fast tokenizer of a folder that has one, without the second and the 300 MB that importing torch takes;
    else whatever transformers finds."""
    if (folder / "tokenizer.json").is_file():
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        settings = folder / "tokenizer_config.json"
        name = TokenizersBackend.__name__
        if not settings.is_file() or json.loads(settings.read_text()).get("tokenizer_class") == name:
            return TokenizersBackend.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
