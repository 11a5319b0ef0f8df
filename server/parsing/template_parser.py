"""Answers of models whose tokenizer says itself how they are read: by the response template that transformers
knows."""

from __future__ import annotations

import json
from typing import Any, Protocol

from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning

REASONING = frozenset({"reasoning", "reasoning_content", "thinking"})
CALLS = "tool_calls"
"""What fields of a message are called."""


class TransformersParser(Protocol):
    """transformers', which tells of fields that open, get text and close."""

    def feed(self, text: str) -> list[dict[str, Any]]: ...
    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]: ...


class TemplateParser:
    """Reads an answer with transformers' parser. A call comes when it is complete. Where the template does not fit
    the answer, the rest of it is content."""

    def __init__(self, parser: TransformersParser) -> None:
        self._parser: TransformersParser | None = parser
        self._untold = ""
        """What has come, and what no event tells of yet."""
        self._index = -1
        self._is_in_call = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        for place, character in enumerate(text):  # one by one, since an error loses what else is in a piece
            if self._parser is None:
                events.append(Content(text[place:]))
                break
            self._untold += character
            try:
                self._take_in(self._parser.feed(character), events)
            except Exception:  # a template is a program, and may fail in any way
                events += self._give_up()
        return events

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        events: list[Event] = []
        if self._parser is not None and not (is_cut and self._is_in_call):
            try:
                self._take_in(self._parser.finalize()[1], events)
            except Exception:  # a template is a program, and may fail in any way
                events += self._give_up()
        return events

    def _take_in(self, told: list[dict[str, Any]], events: list[Event]) -> None:
        begins_call = any(event["type"] == "region_open" and event["field"] == CALLS for event in told)
        for event in told:
            field = event["field"]
            self._is_in_call = field == CALLS and event["type"] != "region_close"
            match event["type"]:
                case "region_open" if field != CALLS:
                    self._untold = self._untold[-1:]  # the mark is told of; its last character may be text already
                case "region_chunk" if field != CALLS:
                    self._untold = ""
                    events.append((Reasoning if field in REASONING else Content)(event["text"]))
                case "region_close" if field == CALLS:
                    events += self._calls(event["value"])
                    self._untold = ""
                case "region_close" if not begins_call:  # else what has come is the mark of the call
                    self._untold = ""

    def _calls(self, value: Any) -> list[Event]:
        events: list[Event] = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call)
            name, arguments = function["name"], function.get("arguments") or {}
            if not isinstance(name, str):
                raise TypeError("a tool's name is text")
            self._index += 1
            events.append(CallBegun(self._index, name))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            events.append(Arguments(self._index, text))
        return events

    def _give_up(self) -> list[Event]:
        self._parser = None
        text, self._untold = self._untold, ""
        return [Content(text)] if text else []
