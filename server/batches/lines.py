"""OpenAI's batch files: a request a line, and an answer a line."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_LINE_BYTES = 16 * 1024 * 1024


class Asked(msgspec.Struct, frozen=True):
    """A line of the input."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class Problem(msgspec.Struct, frozen=True):
    code: str
    message: str


class HttpAnswer(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class Answered(msgspec.Struct, frozen=True):
    """A line of the output."""

    id: str
    custom_id: str | None
    response: HttpAnswer | None
    error: Problem | None

    @classmethod
    def with_problem(cls, custom_id: str | None, code: str, message: str) -> Answered:
        return cls(line_id(), custom_id, None, Problem(code, message))


def line_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


BEGINNING = b'{"id":"batch_req_'
"""Of each line of the output."""

_asked = msgspec.json.Decoder(Asked)


class _Named(msgspec.Struct):
    custom_id: str | None = None


_named = msgspec.json.Decoder(_Named)


def read_requests(file: Path) -> Iterator[Asked | Answered]:
    """The lines of the input, one at a time; one that is no request comes as its answer, which says so. Blank
    lines are none."""
    seen: set[str] = set()
    with file.open("rb") as lines:
        for number, line in enumerate(_bounded(lines), 1):
            if not line.strip():
                continue
            try:
                asked = _asked.decode(line)
            except msgspec.MsgspecError as error:
                yield Answered.with_problem(f"line-{number}", "invalid_line", f"line {number}: {error}")
                continue
            if asked.custom_id in seen:
                message = f"line {number}: the custom_id {asked.custom_id!r} is there twice"
                yield Answered.with_problem(f"line-{number}", "duplicate_custom_id", message)
            elif asked.url not in URLS or asked.method != "POST":
                seen.add(asked.custom_id)
                message = f"line {number}: {asked.method} {asked.url} is none of POST {', '.join(URLS)}"
                yield Answered.with_problem(asked.custom_id, "invalid_url", message)
            else:
                seen.add(asked.custom_id)
                yield asked


def _bounded(lines: BinaryIO) -> Iterator[bytes]:
    """Lines, with most of one that is far too long left out: it is no JSON then."""
    while line := lines.readline(MAX_LINE_BYTES):
        yield line
        while line and not line.endswith(b"\n"):
            line = lines.readline(MAX_LINE_BYTES)


class NoAnswerFileError(ValueError):
    """The file has something else in it; the message says so."""


class AnswerFile:
    """The output. What a run that was killed wrote into it stays, but for a last line that it did not finish.
    Raises `NoAnswerFileError` for a file that is no such output, which stays as it is."""

    def __init__(self, path: Path) -> None:
        self.done: set[str] = set()
        """The custom ids that are answered."""
        self.num_failed = 0
        end = 0
        with path.open("ab"):
            pass
        self._file = path.open("r+b")
        for line in self._file:
            if not line.endswith(b"\n") and line.startswith(BEGINNING[: len(line)]):
                break  # the one that was not finished
            try:
                self._note(msgspec.json.decode(line, type=Answered))
            except msgspec.MsgspecError:
                self._file.close()
                raise NoAnswerFileError(f"{path} is there already, and is not the output of a batch") from None
            end += len(line)
        self._file.seek(end)
        self._file.truncate()

    def write(self, answered: Answered) -> None:
        """At once, so that a kill loses nothing that was answered."""
        self._file.write(msgspec.json.encode(answered) + b"\n")
        self._file.flush()
        self._note(answered)

    def _note(self, answered: Answered) -> None:
        if answered.custom_id is not None:
            self.done.add(answered.custom_id)
        response = answered.response
        self.num_failed += response is None or response.status_code != 200

    def close(self) -> None:
        self._file.close()
