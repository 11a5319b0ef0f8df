"""From a conversation to tokens, by the model's chat template.

What people say stays text: a message that spells out a special token (`<|im_end|>`) does not end the turn. Such
places are hidden from the template, which puts special tokens of its own around them, and come back as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import tokenizers

from scheduler.sampling_params import InvalidRequestError
from scheduler.text.system_turns import SystemTurns, Turn, arranged, probe

Json = Any

OPENING, CLOSING = "\ue000", "\ue001"
"""Around the number of a hidden place. They are private characters; where a message has one, it is hidden too."""


KNOWN_TEMPLATES = 8
"""That system turns were tried on: the model's, and those that requests bring along."""


class ChatTemplate:
    """`tokenizer` is one of transformers'. `template` takes the place of the model's own."""

    def __init__(self, tokenizer: Any, template: str | None, *, special_in_text: bool) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_in_text = special_in_text
        self._system_turns = lru_cache(KNOWN_TEMPLATES)(self._probed)

    @property
    def source(self) -> str:
        """The template's text; empty where there is none. Of several it is the one for tools."""
        template = self._template or self._tokenizer.chat_template or ""
        if isinstance(template, dict):
            return str(template.get("tool_use") or template.get("default") or "")
        return str(template)

    def tokens(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        tools: Sequence[Json] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Json] | None = None,
    ) -> str | list[int]:
        """The prompt: as text that is yet to be tokenized, or as tokens where that would not do. System turns
        may stand anywhere: see `arranged`. Raises
        `InvalidRequestError` if there is no template, or if it refuses the messages."""
        if not (template or self.source):
            raise InvalidRequestError("this model has no chat template: use /v1/completions", "messages")
        messages = arranged(messages, self._system_turns(template))
        hidden = Hidden(self._special_tokens if not self._special_in_text else None)
        try:
            text = self._tokenizer.apply_chat_template(
                hidden.hide(messages),
                tools=hidden.hide(list(tools)) if tools else None,
                chat_template=template or self._template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=False,
                **hidden.hide(dict(variables or {})),
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error or type(error).__name__}", "messages"
            ) from error
        assert isinstance(text, str)
        return self._encode(text, hidden) if hidden.places else text

    def _probed(self, template: str | None) -> SystemTurns:
        """Where a template, or the model's own, has system turns."""

        def render(turns: list[Turn]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=template or self._template, add_generation_prompt=True, tokenize=False
            )
            return text

        return probe(render)

    def _encode(self, text: str, hidden: Hidden) -> list[int]:
        """The template's special tokens as such, and what is between them as text."""
        token_ids: list[int] = []
        end = 0
        for special in self._special_tokens.finditer(text):
            token_ids += self._encode_plain(hidden.restore(text[end : special.start()]))
            token_ids.append(self._tokenizer.convert_tokens_to_ids(special[0]))
            end = special.end()
        return token_ids + self._encode_plain(hidden.restore(text[end:]))

    def _encode_plain(self, text: str) -> list[int]:
        token_ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return token_ids

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A tokenizer to which special tokens are text. One of its own: that is a setting of it, not of a call."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


class Hidden:
    """Places of a conversation that a pattern finds; None hides nothing."""

    def __init__(self, pattern: re.Pattern[str] | None) -> None:
        self.places: list[str] = []
        self._pattern = pattern and re.compile(f"{pattern.pattern}|{OPENING}|{CLOSING}")

    def hide(self, value: Json) -> Json:
        """The value with each place replaced by its number, in all strings that it holds."""
        if self._pattern is None:
            return value
        match value:
            case str():
                return self._pattern.sub(self._replacement, value)
            case list():
                return [self.hide(item) for item in value]
            case dict():
                return {self.hide(key): self.hide(item) for key, item in value.items()}
        return value

    def _replacement(self, found: re.Match[str]) -> str:
        self.places.append(found[0])
        return f"{OPENING}{len(self.places) - 1}{CLOSING}"

    def restore(self, text: str) -> str:
        return re.sub(f"{OPENING}([0-9]+){CLOSING}", lambda found: self.places[int(found[1])], text)
