"""From a conversation to tokens, by the model's chat template.

What people say stays text: a message that spells out a special token (`<|im_end|>`) does not end the turn. Such
places are hidden from the template, which puts special tokens of its own around them, and come back as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import tokenizers

from scheduler.core.request import InvalidRequestError
from scheduler.text.content_form import in_parts, wants_parts
from scheduler.text.system_turns import SystemTurns, Turn, arranged, probe

Json = Any

OPENING, CLOSING = "\ue000", "\ue001"
"""Around the number of a hidden place. They are private characters; where a message has one, it is hidden too."""


KNOWN_TEMPLATES = 8
"""That were tried: the model's, and those that requests bring along."""


class _Form(NamedTuple):
    """Of the turns that a template takes."""

    has_parts: bool
    """A content is a list of parts, and no text."""
    system_turns: SystemTurns


class ChatTemplate:
    """`tokenizer` is one of transformers'. `template` takes the place of the model's own."""

    def __init__(self, tokenizer: Any, template: str | None, *, special_in_text: bool) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_in_text = special_in_text
        self._form = lru_cache(KNOWN_TEMPLATES)(self._probed)

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
        form = self._form(template)
        messages = arranged(messages, form.system_turns)
        hidden = Hidden(self._special_tokens if not self._special_in_text else None)
        try:
            text = self._tokenizer.apply_chat_template(
                hidden.hide(in_parts(messages) if form.has_parts else messages),
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

    def _probed(self, template: str | None) -> _Form:
        """What a template, or the model's own, makes of turns."""

        def render(turns: list[Turn]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=template or self._template, add_generation_prompt=True, tokenize=False
            )
            return text

        if wants_parts(render):
            return _Form(True, probe(lambda turns: render(in_parts(turns))))
        return _Form(False, probe(render))

    def _encode(self, text: str, hidden: Hidden) -> list[int]:
        """The tokens of the whole, in which what was hidden is text: a mark within it keeps it from being more,
        and the mark's own tokens are left out. So nobody else's tokens change."""
        whole = hidden.restore(text, str)
        mark = next(each for each in map(chr, range(0xE000, 0xF900)) if each not in whole)  # private characters
        marked = hidden.restore(text, lambda place: self._broken(place, mark))
        encoding = self._tokenizer(marked, add_special_tokens=False, return_offsets_mapping=True)
        token_ids: list[int] = []
        for token_id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            covered = marked[start:end]
            if mark not in covered:
                token_ids.append(token_id)
            elif covered != mark:
                token_ids += self._plain.encode(covered.replace(mark, ""), add_special_tokens=False).ids
        return token_ids

    def _broken(self, text: str, mark: str) -> str:
        """The text with marks, such that no special token can be found in it."""
        found = self._special_tokens.search(text)
        if found is None:
            return text
        cut = found.start() + 1
        return text[:cut] + mark + self._broken(text[cut:], mark)

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

    def restore(self, text: str, written: Callable[[str], str]) -> str:
        """The text with each place as `written`."""
        return re.sub(f"{OPENING}([0-9]+){CLOSING}", lambda found: written(self.places[int(found[1])]), text)
