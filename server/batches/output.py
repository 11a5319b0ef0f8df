"""The output of a batch: a file that tells, after any kill, what is still to do."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from scheduler.shared_thread import Pieces
from server.batches.lines import ID_PREFIX, OutputLine
from server.private import create_private, new_private_file

_BEGINNING = b'{"id":"' + ID_PREFIX.encode()
"""Of each line."""


class OutputError(ValueError):
    """The output cannot be written to; the message says why."""


class Output:
    """The output file, opened to be appended to by one run at a time. Entering it raises `OutputError`; what is
    there already is known when `read` is done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        """Of the whole lines."""
        self.answered: set[str] = set()
        """The `custom_id` of each line that has a response."""
        self.refused: set[str] = set()
        """The ids of the lines that have an error instead."""
        self.num_failed = 0
        """Lines without an answer of status 200."""

    def __enter__(self) -> Self:
        try:
            create_private(self._path)
            # Without a buffer: what a full disk did not take must not come later by itself.
            self._file = self._path.open("a+b", buffering=0)
        except OSError as error:
            raise OutputError(f"{self._path}: {error.strerror}") from error
        try:
            self._lock()
            self._size = os.fstat(self._file.fileno()).st_size
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self) -> Pieces[None]:
        """Note what is there. Of a last line that a kill tore, nothing stays. Raises `OutputError`."""
        self._size = 0
        with self._path.open("rb") as lines:
            for number, content in enumerate(lines, 1):
                if content.endswith(b"\n"):
                    try:
                        self._note(msgspec.json.decode(content, type=OutputLine))
                    except (msgspec.DecodeError, UnicodeDecodeError) as error:
                        raise OutputError(
                            f"{self._path}: line {number} is not of a batch's output: {error}"
                        ) from None
                    self._size += len(content)
                elif content.startswith(_BEGINNING) or _BEGINNING.startswith(content):
                    self._file.truncate(self._size)
                else:
                    raise OutputError(f"{self._path}: line {number} is not of a batch's output")
                yield

    def write(self, lines: Sequence[OutputLine]) -> None:
        """Append lines, which are in the hands of the system when this returns. Of lines that a full disk does not
        take nothing stays, and they may be written again. Raises OSError."""
        content = memoryview(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        written = 0
        try:
            while written < len(content):
                written += self._file.write(content[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += written
        for line in lines:
            self._note(line)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{self._path}: another `carousel batch` writes to it") from None

    def _note(self, line: OutputLine) -> None:
        self.num_failed += line.is_failure
        if line.response is None or line.custom_id is None:
            self.refused.add(line.id)
        else:
            self.answered.add(line.custom_id)


def split(path: Path, failures: Path) -> Pieces[bool]:
    """Move the lines of an output that are failures into a file of their own; False if there are none. May be done
    again where it did not come to its end."""
    rest = path.with_suffix(".rest")
    with path.open("rb") as lines, new_private_file(failures) as failed, new_private_file(rest) as answered:
        for line in lines:
            (failed if msgspec.json.decode(line, type=OutputLine).is_failure else answered).write(line)
            yield
    if failures.stat().st_size == 0:
        failures.unlink()
        rest.unlink()
        return False
    rest.replace(path)
    return True
