"""Finds the calls of tools in an answer. Formats differ in what stands around a call and in how one is written
(`CallFormat`); what is no call after all is content, to the letter."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection

import msgspec

from server.parsing.events import Arguments, CallBegun, Content, Event, possible_start, without_start
from server.parsing.json_scanner import Status
from server.parsing.readers import ExpressionReader, NamedReader, ObjectReader, Reader

SPACE = " \t\r\n"


class Notation(enum.Enum):
    """How a call is written."""

    OBJECT = enum.auto()
    """`{"name": "f", "arguments": {...}}`"""
    NAME_AND_OBJECT = enum.auto()
    """`f[ARGS]{...}`, or as an object."""
    EXPRESSION = enum.auto()
    """`f(a=1)`"""


class CallFormat(msgspec.Struct, frozen=True):
    """How a family of models writes calls."""

    opening: str
    """What stands before calls, wherever they are in the answer; empty if nothing does."""
    closing: str = ""
    """What stands after them, if the model does not forget it."""
    notation: Notation = Notation.OBJECT
    starts_answer: bool = False
    """Whether calls may also begin the answer with nothing before them."""
    may_be_listed: bool = False
    """Whether calls may stand in a list."""
    separators: str = ","
    """Of calls, in a list or without one."""


class CallParser:
    """Reads an answer in one of the formats. `known`: the names of the tools that there are, which tell a call
    from other JSON where nothing else does. `held`: what has nothing before it is a call only as `held_grammar`
    begins one.

    A call has begun once its name is known and its arguments have begun. If it goes wrong after that, what remains
    up to the closing mark counts to the arguments, which are no JSON then. White space before calls and at the end
    of an answer with calls is left out.
    """

    def __init__(self, form: CallFormat, known: Collection[str], *, held: bool = False) -> None:
        self._form = form
        self._held = held
        self._names: Collection[str] | None = known or None
        """Those that a call may have where it stands."""
        self._text = ""
        """What has come and was not read."""
        self._is_last = False
        self._is_cut = False
        self._events: list[Event] = []
        self._space = ""
        """White space that is content if there is more of it."""
        self._attempt = ""
        """What was read of something that may be a call, with all that stands before it."""
        self._is_listed = False
        self._reader: Reader = ObjectReader()
        self._index = -1
        self._has_begun = False
        """Whether the call that is being read has been told of."""
        self._state: Callable[[], bool] = self._at_start if form.starts_answer else self._in_content
        """Reads on, and returns whether there is more that can be done with the text."""

    def push(self, text: str) -> list[Event]:
        self._text += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        self._is_last, self._is_cut = True, is_cut
        events = self.push("")
        if self._index < 0 and self._space:
            events.append(Content(self._space))
        return events

    def _at_start(self) -> bool:
        """A call with nothing before it can only be here."""
        text = self._text.lstrip(SPACE)
        if not text and not self._is_last:
            return False
        if text.startswith("{" if self._form.notation is Notation.OBJECT else "[") or (
            self._form.may_be_listed and text.startswith("[")
        ):
            return self._go_on(self._before_call)
        return self._go_on(self._in_content)

    def _in_content(self) -> bool:
        opening = self._form.opening
        place = self._text.find(opening) if opening else -1
        if place >= 0:
            self._say(self._text[:place])
            self._text = self._text[place:]
            self._read(len(opening))
            self._names = None
            return self._go_on(self._before_call)
        self._say(self._up_to(opening))
        return False

    def _before_call(self) -> bool:
        self._skip_space()
        if not self._text:
            return self._is_last and self._end_attempt()
        if self._form.may_be_listed and not self._is_listed and self._text[0] == "[":
            self._is_listed = True
            self._read(1)
            return True
        reader = self._new_reader(self._text[0])
        if reader is None:
            return self._give_up()
        self._reader = reader
        self._has_begun = False
        return self._go_on(self._in_call)

    def _new_reader(self, first: str) -> Reader | None:
        if first == "{" and self._form.notation is not Notation.EXPRESSION:
            return ObjectReader(self._names, name_first=self._held and self._names is not None)
        if self._form.notation is Notation.NAME_AND_OBJECT and not self._is_listed:
            return NamedReader()
        if self._form.notation is Notation.EXPRESSION and self._is_listed:
            return ExpressionReader(self._names)
        return None

    def _in_call(self) -> bool:
        self._read(self._reader.read(self._text))
        if self._reader.name is not None:
            if not self._has_begun:
                self._has_begun = True
                self._index += 1
                self._space = ""
                self._events.append(CallBegun(self._index, self._reader.name))
            self._pass_arguments(self._reader.take())
        match self._reader.status:
            case Status.DONE:
                self._attempt = ""
                return self._go_on(self._after_call)
            case Status.BROKEN:
                return self._go_on(self._in_broken_call) if self._has_begun else self._give_up()
            case Status.OPEN:
                return self._is_last and not self._has_begun and self._end_attempt()

    def _in_broken_call(self) -> bool:
        """All that is left, up to the closing mark, was meant as arguments."""
        closing = self._form.closing
        place = self._text.find(closing) if closing else -1
        if place >= 0:
            self._pass_arguments(self._text[:place])
            self._text = self._text[place:]
            return self._go_on(self._after_calls)
        self._pass_arguments(self._up_to(closing))
        return False

    def _after_call(self) -> bool:
        self._skip_space()
        if not self._text:
            return False
        if self._text[0] in self._form.separators:
            self._read(1)
            return self._go_on(self._before_call)
        if self._is_listed and self._text[0] == "]":
            self._read(1)
            self._attempt = ""
            return self._go_on(self._after_calls)
        if self._text[0] == "{" and not self._is_listed:
            return self._go_on(self._before_call)
        return self._go_on(self._after_calls)

    def _after_calls(self) -> bool:
        closing = self._form.closing
        if closing:
            self._skip_space()
            if self._text.startswith(closing):
                self._text = self._text.removeprefix(closing)
                self._attempt = ""
            elif closing.startswith(self._text) and not self._is_last:
                return False
            elif self._is_cut and closing.startswith(self._text):
                self._attempt = self._text = ""
        return self._return_to_content()

    def _end_attempt(self) -> bool:
        """The answer ends in what may become a call. If it was cut there, nobody meant it as content."""
        opening = self._form.opening
        is_marked = bool(opening) and self._attempt.startswith(opening)
        if self._is_cut and (is_marked or self._index >= 0 or self._reader.is_likely):
            self._attempt = ""
            return False
        return self._give_up()

    def _give_up(self) -> bool:
        """It is no call, so it is content. There may be a call further on in it."""
        if self._form.opening and self._attempt.startswith(self._form.opening):
            self._say(self._form.opening)
            self._attempt = self._attempt.removeprefix(self._form.opening)
        return self._return_to_content()

    def _return_to_content(self) -> bool:
        self._text = self._attempt + self._text
        self._attempt = ""
        self._is_listed = False
        return self._go_on(self._in_content)

    def _up_to(self, mark: str) -> str:
        """The text that has come, without what may be the beginning of a mark, which is left."""
        if mark and self._is_cut:
            self._text = without_start(self._text, mark)
        place = possible_start(self._text, mark) if mark and not self._is_last else len(self._text)
        text, self._text = self._text[:place], self._text[place:]
        return text

    def _go_on(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _skip_space(self) -> None:
        self._read(len(self._text) - len(self._text.lstrip(SPACE)))

    def _read(self, count: int) -> None:
        self._attempt += self._text[:count]
        self._text = self._text[count:]

    def _pass_arguments(self, text: str) -> None:
        if text:
            self._events.append(Arguments(self._index, text))

    def _say(self, text: str) -> None:
        text = self._space + text
        said = text.rstrip(SPACE)
        self._space = text[len(said) :]
        if said:
            self._events.append(Content(said))
