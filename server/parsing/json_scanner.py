"""Reads one JSON object as its text comes, and forgives what models get wrong in strings."""

from __future__ import annotations

import enum
import json
import re
from typing import NamedTuple

_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR_RUN = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_SPACE_RUN = re.compile(r"[ \t\r\n]+")
_ESCAPABLE = frozenset('"\\/bfnrtu')
_CLOSER = {"{": "}", "[": "]"}


class Status(enum.Enum):
    """Of something that is being read."""

    OPEN = enum.auto()
    DONE = enum.auto()
    BROKEN = enum.auto()
    """It is not what it should be."""


class Role(enum.Enum):
    """What a piece of JSON text is."""

    KEY = enum.auto()
    VALUE = enum.auto()
    """Its brackets too."""
    COLON = enum.auto()
    COMMA = enum.auto()
    SPACE = enum.auto()


class Piece(NamedTuple):
    """A part of the text that belongs to one key or value. `depth`: how many objects and lists it is in."""

    depth: int
    role: Role
    text: str


class _Expects(enum.Enum):
    OBJECT = enum.auto()
    KEY = enum.auto()
    KEY_OR_END = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    COMMA_OR_END = enum.auto()


class JsonScanner:
    """Reads one JSON object. Line breaks within strings, and backslashes that escape nothing, are written as they
    should be; other mistakes break it."""

    def __init__(self) -> None:
        self.status = Status.OPEN
        self._open: list[str] = []
        self._expects = _Expects.OBJECT
        self._string: Role | None = None
        """What the string that is being read is."""
        self._escapes = False
        self._scalar = ""
        self._pieces: list[Piece] = []

    def read(self, text: str) -> tuple[list[Piece], int]:
        """Read on. Returns the pieces, and how many characters of the text are part of the object."""
        place = 0
        while place < len(text) and self.status is Status.OPEN:
            place = self._read_string(text, place) if self._string else self._read_other(text, place)
        pieces, self._pieces = self._pieces, []
        return pieces, place

    def _add(self, role: Role, text: str) -> None:
        self._pieces.append(Piece(len(self._open), role, text))

    def _read_string(self, text: str, place: int) -> int:
        assert self._string is not None
        character = text[place]
        if self._escapes:
            self._escapes = False
            self._add(self._string, f"\\{character}" if character in _ESCAPABLE else _escaped(character))
        elif run := _STRING_RUN.match(text, place):
            self._add(self._string, run.group())
            return run.end()
        elif character == "\\":
            self._escapes = True
        elif character == '"':
            self._add(self._string, character)
            is_key, self._string = self._string is Role.KEY, None
            if is_key:
                self._expects = _Expects.COLON
            else:
                self._end_value()
        else:
            self._add(self._string, _inside(character))
        return place + 1

    def _read_other(self, text: str, place: int) -> int:
        if run := _SCALAR_RUN.match(text, place):
            if not self._scalar and self._expects not in (_Expects.VALUE, _Expects.VALUE_OR_END):
                self.status = Status.BROKEN
                return place
            self._scalar += run.group()
            self._add(Role.VALUE, run.group())
            return run.end()
        if self._scalar:
            if not _SCALAR.fullmatch(self._scalar):
                self.status = Status.BROKEN
                return place
            self._scalar = ""
            self._end_value()
        if run := _SPACE_RUN.match(text, place):
            self._add(Role.SPACE, run.group())
            return run.end()
        return self._read_mark(text[place], place)

    def _read_mark(self, mark: str, place: int) -> int:
        match self._expects, mark:
            case (_Expects.OBJECT | _Expects.VALUE | _Expects.VALUE_OR_END, "{"):
                self._begin(mark, _Expects.KEY_OR_END)
            case (_Expects.VALUE | _Expects.VALUE_OR_END, "["):
                self._begin(mark, _Expects.VALUE_OR_END)
            case (_Expects.VALUE | _Expects.VALUE_OR_END, '"'):
                self._string = Role.VALUE
                self._add(Role.VALUE, mark)
            case (_Expects.KEY | _Expects.KEY_OR_END, '"'):
                self._string = Role.KEY
                self._add(Role.KEY, mark)
            case (_Expects.COLON, ":"):
                self._expects = _Expects.VALUE
                self._add(Role.COLON, mark)
            case (_Expects.COMMA_OR_END, ","):
                self._expects = _Expects.KEY if self._open[-1] == "{" else _Expects.VALUE
                self._add(Role.COMMA, mark)
            case (_Expects.KEY_OR_END | _Expects.VALUE_OR_END | _Expects.COMMA_OR_END, "}" | "]") if (
                mark == _CLOSER[self._open[-1]]
            ):
                self._open.pop()
                self._add(Role.VALUE, mark)
                self._end_value()
            case _:
                self.status = Status.BROKEN
                return place
        return place + 1

    def _begin(self, mark: str, expects: _Expects) -> None:
        self._add(Role.VALUE, mark)
        self._open.append(mark)
        self._expects = expects

    def _end_value(self) -> None:
        self._expects = _Expects.COMMA_OR_END
        if not self._open:
            self.status = Status.DONE


def _escaped(character: str) -> str:
    """What a backslash before a character that needs none must have meant."""
    return character if character == "'" else _inside(f"\\{character}")


def _inside(text: str) -> str:
    """As it is written within a JSON string."""
    return json.dumps(text)[1:-1]
