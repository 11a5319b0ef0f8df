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

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """The name of each tool that was called, and the text of its arguments."""

    def add(self, event: Event) -> None:
        match event:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallBegun(_, name):
                self.calls.append((name, ""))
            case Arguments(index, text):
                name, before = self.calls[index]
                self.calls[index] = name, before + text


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call, as an object; one that was cut short has none."""
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
