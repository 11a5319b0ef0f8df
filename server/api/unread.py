"""What a message has that is no text, as an image: this model cannot read it. In what was said before it becomes a
text that says so; where it is the question itself it is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from scheduler.core.request import InvalidRequestError

READS_TEXT = "this model reads text only"


class Turn(Protocol):
    @property
    def role(self) -> str: ...

    @property
    def unread(self) -> str | None:
        """The type of something in it that is no text."""


def in_place_of(kind: str) -> str:
    return f"[{kind[:40]}: {READS_TEXT}]"


def check_question(turns: Iterable[tuple[int, Turn]], field: str) -> None:
    """Raise `InvalidRequestError` for what cannot be read in what the user says last. Turns come with their places
    in the `field`."""
    asked: list[tuple[int, Turn]] = []
    for place, turn in turns:
        if turn.role == "assistant":
            asked = []
        elif turn.role == "user":
            asked.append((place, turn))
    for place, turn in asked:
        if (kind := turn.unread) is not None:
            param = f"{field}[{place}].content"
            raise InvalidRequestError(f"{param} has a part of type {kind[:40]}: {READS_TEXT}", param)
