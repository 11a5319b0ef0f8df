"""What an answer says: heard delta by delta, and put together for who wants it in one piece."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from scheduler.client.async_engine import Delta
from scheduler.core.request import FinishReason
from server.parsing.events import Arguments, CallBegun, Content, Event, Parser, Reasoning, merged


class Transcript:
    """One choice of an answer, as its parser hears it."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self.has_called = False
        """Whether it has called a tool so far."""

    def hear(self, delta: Delta) -> list[Event]:
        """What a piece of the answer turns out to say."""
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            was_stopped = isinstance(delta.output.stop_reason, str)
            events += self._parser.finish(is_cut=was_stopped or delta.finish_reason is FinishReason.LENGTH)
        self.has_called |= any(isinstance(event, CallBegun) for event in events)
        return merged(events)


@dataclass(slots=True)
class Said:
    """All that was said, by kinds."""

    _content: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """The name of each tool that was called, and the text of its arguments."""
        return [(name, "".join(parts)) for name, parts in self._calls]

    def add(self, event: Event) -> None:
        match event:
            case Content(text):
                self._content.append(text)
            case Reasoning(text):
                self._reasoning.append(text)
            case CallBegun(_, name):
                self._calls.append((name, []))
            case Arguments(index, text):
                self._calls[index][1].append(text)

    def pop(self) -> tuple[str, str]:
        """The content and the reasoning since the last time; calls are kept until they are whole."""
        said = self.content, self.reasoning
        self._content, self._reasoning = [], []
        return said


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call, as an object; one that was cut short has none."""
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
