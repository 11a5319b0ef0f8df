"""Calls of custom tools, which are served as functions of one string: their input comes out as text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from server.parsing.events import Arguments, CallBegun, Event, Parser
from server.parsing.json_scanner import JsonScanner, Piece, Role

_TOKEN = re.compile(r"[^\\]+|\\[^u]|\\u[0-9a-fA-F]{4}|\\u(?=[0-9a-fA-F]{0,3}[^0-9a-fA-F])")
"""Of a string's JSON; the last is an escape that went wrong, which is text."""


class CustomCalls:
    """Reads what another parser does. The arguments of calls of the tools in `names` are the text that they have,
    not JSON."""

    def __init__(self, parser: Parser, names: Collection[str]) -> None:
        self._parser = parser
        self._names = names
        self._inputs: dict[int, _Input] = {}

    def push(self, text: str) -> list[Event]:
        return self._translated(self._parser.push(text))

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        return self._translated(self._parser.finish(is_cut=is_cut))

    def _translated(self, events: list[Event]) -> list[Event]:
        translated: list[Event] = []
        for event in events:
            match event:
                case CallBegun(index, name) if name in self._names:
                    self._inputs[index] = _Input()
                    translated.append(event)
                case Arguments(index, text) if index in self._inputs:
                    if said := self._inputs[index].read(text):
                        translated.append(Arguments(index, said))
                case _:
                    translated.append(event)
        return translated


class _Input:
    """The first value of a JSON object, piece by piece: of a string its text, of something else its JSON."""

    def __init__(self) -> None:
        self._scanner = JsonScanner()
        self._waiting = ""
        """Of a string: the beginning of an escape."""
        self._high = ""
        """The first half of a pair of surrogates."""
        self._is_string: bool | None = None
        """Of the value; None before it begins."""
        self._is_over = False

    def read(self, text: str) -> str:
        """What the next piece of JSON adds."""
        return "".join(map(self._take_in, self._scanner.read(text)[0]))

    def _take_in(self, piece: Piece) -> str:
        is_key = piece.depth == 1 and piece.role in (Role.KEY, Role.COLON)
        if piece.depth == 0 or is_key or self._is_over:
            return ""
        if piece.role is Role.COMMA and piece.depth == 1:
            self._is_over = True
            return ""
        if self._is_string is None:
            if piece.role is Role.SPACE:
                return ""
            self._is_string = piece.text == '"'
            if self._is_string:
                return ""
        if not self._is_string:
            return piece.text
        if piece.text == '"':
            self._is_over = True
            return ""
        return self._decoded(piece.text)

    def _decoded(self, text: str) -> str:
        """What a string's text adds, but for half of an escape or of a pair of surrogates at its end."""
        self._waiting += text
        characters, end = self._high, 0
        while token := _TOKEN.match(self._waiting, end):
            characters += token[0] if token[0] == "\\u" else json.loads(f'"{token[0]}"')
            end = token.end()
        self._waiting = self._waiting[end:]
        self._high = characters[-1:] if "\ud800" <= characters[-1:] <= "\udbff" else ""
        characters = characters.removesuffix(self._high)
        return characters.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
