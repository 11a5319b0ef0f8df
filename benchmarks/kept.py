"""Turns of a comparison, kept in a file as they are measured: what was cut off goes on, and servers can be
measured one after the other, on a machine that has no room or time for all at once."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date
from pathlib import Path

import msgspec

from server.bench.load import RunResult


class Turn(msgspec.Struct, frozen=True):
    """What one server did with one round's requests at one concurrency."""

    server: str
    concurrency: int
    number: int
    """Of the round."""
    settings: str
    """What else decides what was sent and to whom; turns with others do not belong together."""
    bits: float | None
    """That one weight takes in this server, if it is known."""
    result: RunResult
    day: str = msgspec.field(default_factory=lambda: str(date.today()))


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Turn).decode


class Kept:
    """The turns of one comparison, a line of `file` each."""

    def __init__(self, file: Path, settings: str) -> None:
        self._file = file
        self._settings = settings
        lines = file.read_bytes().splitlines() if file.exists() else []
        self._turns = [_decode(line) for line in lines if line.endswith(b"}")]  # the last may have been cut off

    def of(self, server: str, concurrency: int) -> list[Turn]:
        """What is there of it, in order of measuring."""
        key = (self._settings, server, concurrency)
        return [turn for turn in self._turns if (turn.settings, turn.server, turn.concurrency) == key]

    def add(self, turn: Turn) -> None:
        self._turns.append(turn)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as output:
            output.write(_encode(turn) + b"\n")

    def forget(self, servers: Collection[str]) -> None:
        """They are to be measured anew."""
        turns = self._turns
        self._turns = []
        self._file.unlink(missing_ok=True)
        for turn in turns:
            if turn.settings != self._settings or turn.server not in servers:
                self.add(turn)
