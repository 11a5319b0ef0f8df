"""The lines of a batch: what a line of the input asks, and what a line of the output says."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINE_BYTES = 16 * 1024 * 1024
"""As large as the largest body that a server takes."""

ID_PREFIX = "batch_req_"
_WHITE_SPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    number: int
    """Its place in the input, from 1 on."""
    custom_id: str
    url: str
    body: bytes
    model: str | None
    """Which it asks for."""


class BadLineError(ValueError):
    """A line that cannot be sent; the message says why."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class Answer(msgspec.Struct):
    """What a server said."""

    status_code: int
    request_id: str
    body: msgspec.Raw
    """JSON."""


class LineError(msgspec.Struct):
    """Why a line was not sent."""

    code: str
    message: str


class OutputLine(msgspec.Struct):
    """What became of one line of the input: it has a response or an error."""

    id: str
    custom_id: str | None
    response: Answer | None = None
    error: LineError | None = None

    @property
    def is_failure(self) -> bool:
        return self.response is None or self.response.status_code != 200


class _InputLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Known(msgspec.Struct):
    """What is read of a line that is not as it should be, and of a body."""

    custom_id: Any = None
    stream: Any = None
    model: Any = None


def id_of(number: int) -> str:
    """The id of the output line for this line of the input; the same each time that a batch is run."""
    return f"{ID_PREFIX}{number}"


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1 on. Of one that is too long, `MAX_LINE_BYTES` + 1 bytes."""
    number = 0
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            content = content.removeprefix(codecs.BOM_UTF8)
        rest = content
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            pass
        yield number, content


def is_blank(line: bytes) -> bool:
    return not line.strip(_WHITE_SPACE)


def read_line(number: int, content: bytes) -> Line:
    """What a line asks. Raises `BadLineError`."""
    if len(content) > MAX_LINE_BYTES:
        raise BadLineError("line_too_long", f"line {number} is longer than {MAX_LINE_BYTES} bytes")
    try:
        line = msgspec.json.decode(content, type=_InputLine)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        code = "invalid_request" if isinstance(error, msgspec.ValidationError) else "invalid_json"
        raise BadLineError(code, f"line {number}: {error}", _custom_id_of(content)) from None
    if line.method != "POST":
        raise BadLineError("invalid_method", f"line {number}: method should be POST", line.custom_id)
    if line.url not in ENDPOINTS:
        message = f"line {number}: url should be {' or '.join(ENDPOINTS)}, not {line.url!r}"
        raise BadLineError("invalid_url", message, line.custom_id)
    body = bytes(line.body)
    try:
        known = msgspec.json.decode(body, type=_Known)
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = f"line {number}: body should be a JSON object"
        raise BadLineError("invalid_request", message, line.custom_id) from None
    if known.stream:
        message = f"line {number}: the lines of a batch are answered in one piece: leave stream out"
        raise BadLineError("invalid_request", message, line.custom_id)
    model = known.model if isinstance(known.model, str) else None
    return Line(number, line.custom_id, line.url, body, model)


def _custom_id_of(content: bytes) -> str | None:
    try:
        custom_id = msgspec.json.decode(content, type=_Known).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return custom_id if isinstance(custom_id, str) else None
