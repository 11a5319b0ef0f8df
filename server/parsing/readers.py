"""One call of a tool, as models write it, read as its text comes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any, Protocol

from server.parsing.json_scanner import JsonScanner, Piece, Role, Status

ARGUMENTS = frozenset({"arguments", "parameters"})
"""What the member with the arguments is called."""


class Reader(Protocol):
    """Reads one call."""

    status: Status
    name: str | None
    """The tool's, once it is certain that this is a call."""

    @property
    def is_likely(self) -> bool:
        """Whether it is nearly certain: the name, or some of it, is a tool's."""

    def read(self, text: str) -> int:
        """Read on. Returns how many characters of the text are part of the call."""

    def take(self) -> str:
        """The JSON text of the arguments, as far as it has come, and without what was taken before."""


class ObjectReader:
    """Of `{"name": "f", "arguments": {...}}`, in either order and among other members. The arguments may also be
    the JSON text of an object, or missing. `known`: the names that there are, if no other is a call.
    `name_first`: only what begins with `"name"` and one of these is a call, to the letter."""

    def __init__(self, known: Collection[str] | None = None, *, name_first: bool = False) -> None:
        self.status = Status.OPEN
        self.name: str | None = None
        self._known = known
        self._name_first = name_first
        self._scanner = JsonScanner()
        self._key = ""
        self._member: str | None = None
        """The key of the value that is being read."""
        self._value = ""
        self._named: str | None = None
        self._arguments: str | None = None
        """What has come of them and was not taken."""

    def read(self, text: str) -> int:
        pieces, used = self._scanner.read(text)
        try:
            for piece in pieces:
                self._take_in(piece)
            self.status = self._scanner.status
            if self.status is Status.DONE:
                self._end()
        except ValueError:
            self.status = Status.BROKEN
        if self._named is not None and self._arguments is not None:
            self.name = self._named
        return used

    def take(self) -> str:
        taken, self._arguments = self._arguments or "", ""
        return taken

    @property
    def is_likely(self) -> bool:
        if self._named is not None:
            return True
        so_far = self._value[1:] if self._member == "name" and self._value.startswith('"') else ""
        return bool(so_far) and any(name.startswith(so_far.rstrip('"')) for name in self._known or ())

    def _take_in(self, piece: Piece) -> None:
        match piece:
            case Piece(1, Role.COLON) if self._name_first and self._named is None and self._key != '"name"':
                raise ValueError("the name does not come first")
            case Piece(1, Role.KEY, text):
                self._key += text
            case Piece(1, Role.COLON):
                self._member, self._key, self._value = json.loads(self._key), "", ""
            case Piece(1, Role.COMMA) | Piece(0, Role.VALUE, "}"):
                self._end_member()
            case Piece(1, Role.SPACE) | Piece(0):
                pass
            case Piece(_, _, text) if self._member in ARGUMENTS and (self._value or text)[0] == "{":
                self._value = "{"
                self._arguments = (self._arguments or "") + text
            case Piece(_, _, text):
                self._value += text

    def _end_member(self) -> None:
        if self._member == "name" and self._named is None:
            name = json.loads(self._value)
            if not isinstance(name, str) or not name or (self._known is not None and name not in self._known):
                raise ValueError(f"no tool is called {name}")
            if self._name_first and self._value != f'"{name}"':
                raise ValueError("the name is written otherwise")
            self._named = name
        elif self._member in ARGUMENTS and self._value != "{":
            value = json.loads(self._value)
            arguments = value if isinstance(value, str) else "{}"
            if not isinstance(value, str | None) or not isinstance(json.loads(arguments), dict):
                raise ValueError("arguments are an object")
            self._arguments = arguments
        self._member = None

    def _end(self) -> None:
        if self._named is None:
            raise ValueError("a call has a name")
        if self._arguments is None:
            self._arguments = "{}"


_NAME_BEFORE_ARGUMENTS = re.compile(r"([A-Za-z0-9_.:-]+)(?:\[CALL_ID\][A-Za-z0-9]+)?(?:\[ARGS\])?[ \n]*(?=\{)")
_NAME_SO_FAR = re.compile(r"[A-Za-z0-9_.:\[\]-]{0,200}[ \n]*")


class NamedReader:
    """Of `f[ARGS]{...}`, as newer Mistral models write it."""

    is_likely = True

    def __init__(self) -> None:
        self.status = Status.OPEN
        self.name: str | None = None
        self._scanner = JsonScanner()
        self._before = ""
        self._arguments = ""

    def read(self, text: str) -> int:
        if self.name is not None:
            return self._read_arguments(text)
        known = len(self._before)
        self._before += text
        if found := _NAME_BEFORE_ARGUMENTS.match(self._before):
            self.name = found.group(1)
            return found.end() - known + self._read_arguments(self._before[found.end() :])
        if not _NAME_SO_FAR.fullmatch(self._before):
            self.status = Status.BROKEN
        return len(text)

    def take(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken

    def _read_arguments(self, text: str) -> int:
        pieces, used = self._scanner.read(text)
        self._arguments += "".join(piece.text for piece in pieces)
        self.status = self._scanner.status
        return used


_FUNCTION = re.compile(r"[A-Za-z_][\w.-]{0,200} ?")
_CODE_RUN = re.compile(r"[^()\[\]{}\"'\\]+")
_WORDS = {"true": True, "false": False, "null": None}


class ExpressionReader:
    """Of `f(a=1, b="x")`, whose arguments come all at once. `known`: as for `ObjectReader`."""

    def __init__(self, known: Collection[str] | None = None) -> None:
        self.status = Status.OPEN
        self.name: str | None = None
        self._known = known
        self._code: list[str] = []
        self._depth = 0
        self._quote: str | None = None
        self._escapes = False
        self._arguments = ""

    def read(self, text: str) -> int:
        place = 0
        while place < len(text) and self.status is Status.OPEN:
            run = None if self._escapes else _CODE_RUN.match(text, place)
            part = run.group() if run else text[place]
            place += len(part)
            self._code.append(part)
            if not run:
                self._take_in(part)
            if self._depth == 0 and self.status is Status.OPEN and not _FUNCTION.fullmatch("".join(self._code)):
                self.status = Status.BROKEN
        return place

    def take(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken

    @property
    def is_likely(self) -> bool:
        name, opening, _ = "".join(self._code).partition("(")
        return bool(opening) and name.strip() in (self._known or ())

    def _take_in(self, mark: str) -> None:
        if self._escapes:
            self._escapes = False
        elif mark == "\\":
            self._escapes = True
        elif self._quote is not None:
            if mark == self._quote:
                self._quote = None
        elif mark in "\"'":
            self._quote = mark
        elif mark in "([{":
            self._depth += 1
        elif mark in ")]}":
            self._depth -= 1
            if self._depth <= 0:
                self._end()

    def _end(self) -> None:
        try:
            name, arguments = _call("".join(self._code))
            self._arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            self.status = Status.BROKEN
            return
        if self._known is not None and name not in self._known:
            self.status = Status.BROKEN
            return
        self.name = name
        self.status = Status.DONE


def _call(code: str) -> tuple[str, dict[str, Any]]:
    """Raises ValueError or SyntaxError for what is no call with literal arguments by name."""
    call = ast.parse(code, mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("not a call with arguments by name")
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("an argument without a name")
        arguments[keyword.arg] = _literal(keyword.value)
    return ast.unparse(call.func), arguments


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Name(word) if word in _WORDS:
            return _WORDS[word]
        case ast.List(items) | ast.Tuple(items):
            return [_literal(item) for item in items]
        case ast.Dict(keys, values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case _:
            value = ast.literal_eval(node)
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(f"JSON has no {type(value).__name__}")
            return value


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("the keys of JSON are strings")
