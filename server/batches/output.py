"""The output of a batch: a file that tells, after any kill, what is still to do."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from server.batches.lines import ID_PREFIX, OutputLine

_BEGINNING = b'{"id":"' + ID_PREFIX.encode()
"""Of each line."""


class OutputError(ValueError):
    """The output cannot be written to; the message says why."""


class Output:
    """The output file, opened to be appended to by one run at a time. Entering it raises `OutputError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.answered: set[str] = set()
        """The `custom_id` of each line that has a response."""
        self.refused: set[str] = set()
        """The ids of the lines that have an error instead."""
        self.num_failed = 0
        """Lines without an answer of status 200."""

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("a+b")
        except OSError as error:
            raise OutputError(f"{self._path}: {error.strerror}") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: OutputLine) -> None:
        """Append a line, which is in the hands of the system when this returns."""
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        self._note(line)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{self._path}: another `carousel batch` writes to it") from None

    def _read(self) -> None:
        """Note what is there. Of a last line that a kill tore, nothing stays."""
        self._file.seek(0)
        whole = 0
        for number, content in enumerate(self._file, 1):
            if content.endswith(b"\n"):
                try:
                    self._note(msgspec.json.decode(content, type=OutputLine))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise OutputError(f"{self._path}: line {number} is not of a batch's output: {error}") from None
                whole += len(content)
            elif content.startswith(_BEGINNING) or _BEGINNING.startswith(content):
                self._file.truncate(whole)
            else:
                raise OutputError(f"{self._path}: line {number} is not of a batch's output")

    def _note(self, line: OutputLine) -> None:
        self.num_failed += line.is_failure
        if line.response is None or line.custom_id is None:
            self.refused.add(line.id)
        else:
            self.answered.add(line.custom_id)


def split(path: Path, failures: Path) -> bool:
    """Move the lines of an output that are failures into a file of their own; False if there are none."""
    with path.open("rb") as lines, failures.open("wb") as failed:
        for line in lines:
            if msgspec.json.decode(line, type=OutputLine).is_failure:
                failed.write(line)
    if failures.stat().st_size == 0:
        failures.unlink()
        return False
    rest = path.with_suffix(".rest")
    with path.open("rb") as lines, rest.open("wb") as answered:
        for line in lines:
            if not msgspec.json.decode(line, type=OutputLine).is_failure:
                answered.write(line)
    rest.replace(path)
    return True
