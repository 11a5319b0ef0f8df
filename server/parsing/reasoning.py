"""Parts what a model thinks from what it then says."""

from __future__ import annotations

from collections.abc import Callable

from server.parsing.events import Event, Parser, Reasoning, possible_start, without_start

SPACE = " \t\r\n"


class ReasoningParser:
    """Reads an answer that may begin with reasoning between two marks, and gives what follows to another parser.
    `has_begun`: the prompt ended with the opening mark. White space around the reasoning is left out."""

    def __init__(self, opening: str, closing: str, rest: Parser, *, has_begun: bool) -> None:
        self._opening = opening
        self._closing = closing
        self._rest = rest
        self._has_begun = has_begun
        self._text = ""
        self._is_last = False
        self._is_cut = False
        self._said = ""
        """White space that is part of the reasoning if there is more of it."""
        self._has_said = False
        self._events: list[Event] = []
        self._state: Callable[[], bool] = self._at_start

    def push(self, text: str) -> list[Event]:
        self._text += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        self._is_last, self._is_cut = True, is_cut
        return self.push("") + self._rest.finish(is_cut=is_cut)

    def _at_start(self) -> bool:
        """Some models open again what the prompt has opened."""
        text = self._text.lstrip(SPACE)
        if text.startswith(self._opening):
            self._text = text.removeprefix(self._opening)
            self._state = self._in_reasoning
        elif self._opening.startswith(text) and not self._is_last:
            return False
        elif self._opening.startswith(text) and self._is_cut and len(text) > 1:
            self._text = ""
            return False
        else:
            self._state = self._in_reasoning if self._has_begun else self._after
        return True

    def _in_reasoning(self) -> bool:
        place = self._text.find(self._closing)
        if place >= 0:
            self._think(self._text[:place])
            self._text = self._text[place + len(self._closing) :]
            self._state = self._before_rest
            return True
        if self._is_cut:
            self._text = without_start(self._text, self._closing)
        place = len(self._text) if self._is_last else possible_start(self._text, self._closing)
        self._think(self._text[:place])
        self._text = self._text[place:]
        return False

    def _before_rest(self) -> bool:
        self._text = self._text.lstrip(SPACE)
        if self._text:
            self._state = self._after
        return bool(self._text)

    def _after(self) -> bool:
        self._events += self._rest.push(self._text)
        self._text = ""
        return False

    def _think(self, text: str) -> None:
        text = self._said + text
        if not self._has_said:
            text = text.lstrip(SPACE)
        thought = text.rstrip(SPACE)
        self._said = text[len(thought) :]
        if thought:
            self._has_said = True
            self._events.append(Reasoning(thought))
