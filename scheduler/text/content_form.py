"""What a chat template takes a turn's content to be: a text, or a list of parts of which texts are one kind.

Templates of models that also see images loop over the parts of a content. Such a loop goes over a text's
characters, finds no part in it, and leaves the text out without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Turn = Mapping[str, Any]

_MARK = "probe-content-form"
"""A text that no template has by itself, and that none divides."""


def wants_parts(render: Callable[[list[Turn]], str]) -> bool:
    """Whether a template shows a text only as a part of a list. `render` may raise anything: that is a refusal."""
    return not _shows(render, _MARK) and _shows(render, _parts(_MARK))


def in_parts(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with each text as a list of one part."""
    return [
        {**turn, "content": _parts(turn["content"])} if isinstance(turn.get("content"), str) else turn
        for turn in turns
    ]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _shows(render: Callable[[list[Turn]], str], content: Any) -> bool:
    try:
        return _MARK in render([{"role": "user", "content": content}])
    except Exception:  # a template is a program, and may fail in any way
        return False
