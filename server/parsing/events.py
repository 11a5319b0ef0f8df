"""What the text of an answer turns out to be, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True):
    """A piece of what is said to the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of what the model thinks before that."""

    text: str


class CallBegun(msgspec.Struct, frozen=True):
    """The answer calls a tool."""

    index: int
    """Of the call among the answer's, from 0."""
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of a call's arguments. All of them make an object, unless the answer was cut short
    or the model went wrong within them."""

    index: int
    text: str


Event = Content | Reasoning | CallBegun | Arguments


class Parser(Protocol):
    """Reads one answer. Wherever its text is cut into pieces, the events say the same, though in other pieces."""

    def push(self, text: str) -> list[Event]:
        """Read the next piece of the answer's text. Returns what is certain by now."""

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """There is no more text. Returns what was held back. `is_cut`: the model would have gone on; then the
        beginning of a mark or of a call is not taken for content."""


class PlainParser:
    """For answers that are nothing but text."""

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        return []


class FirstCall:
    """Reads what another parser does, without the calls behind the first one."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def push(self, text: str) -> list[Event]:
        return _first_call(self._parser.push(text))

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        return _first_call(self._parser.finish(is_cut=is_cut))


def _first_call(events: list[Event]) -> list[Event]:
    return [event for event in events if not (isinstance(event, CallBegun | Arguments) and event.index > 0)]


def merged(events: Iterable[Event]) -> list[Event]:
    """The same with pieces that follow each other joined, so that answers can be compared or given as a whole."""
    whole: list[Event] = []
    for event in events:
        match (whole[-1] if whole else None), event:
            case Content(before), Content(text):
                whole[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                whole[-1] = Reasoning(before + text)
            case Arguments(index, before), Arguments(same, text) if index == same:
                whole[-1] = Arguments(index, before + text)
            case _:
                whole.append(event)
    return whole


def without_start(text: str, marker: str) -> str:
    """A text that was cut, without the beginning of the marker at its end. One character alone says too little."""
    place = possible_start(text, marker)
    return text if len(text) - place == 1 else text[:place]


def possible_start(text: str, marker: str) -> int:
    """Where in this text the marker could begin, if more text followed: at the text's length if nowhere."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return len(text) - length
    return len(text)
