"""A GGUF file read a second time (see second_reader.py): its header, as ggml's docs/gguf.md has it, and its blocks
of numbers, which the gguf package makes floats of. The package's own reader of headers looks at each token of the
vocabulary, which takes seconds.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

_STRING, _LIST = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of the header's values."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. Texts in lists, the vocabulary among them, are left out."""

    values: dict[str, Any]
    tensors: dict[str, Place]


class Place(NamedTuple):
    """Where a tensor is."""

    shape: list[int]
    """Rows first."""
    type: int
    offset: int
    """From the start of the file, in bytes."""
    file: Path


def read_header(file: Path) -> Header:
    with file.open("rb", buffering=1 << 20) as stream:
        _, num_tensors, num_values = _take(stream, "IQQ", skip=4)
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = _text(stream)
            values[key] = _value(stream, *_take(stream, "I"))
        found = []
        for _ in range(num_tensors):
            name = _text(stream)
            (depth,) = _take(stream, "I")
            shape = list(_take(stream, "Q" * depth))[::-1]
            found.append((name, shape, *_take(stream, "IQ")))
        step = values.get("general.alignment", 32)
        start = (stream.tell() + step - 1) // step * step
    return Header(values, {name: Place(shape, kind, start + at, file) for name, shape, kind, at in found})


def _take(stream: IO[bytes], form: str, skip: int = 0) -> tuple[Any, ...]:
    stream.seek(skip, os.SEEK_CUR)
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))


def _text(stream: IO[bytes]) -> str:
    return stream.read(*_take(stream, "Q")).decode()


def _value(stream: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _text(stream)
    if kind != _LIST:
        return _take(stream, _NUMBERS[kind])[0]
    of, count = _take(stream, "IQ")
    if of != _STRING:
        return [_value(stream, of) for _ in range(count)]
    for _ in range(count):
        (length,) = _take(stream, "Q")
        stream.seek(length, os.SEEK_CUR)
    return None


def read_floats(place: Place, rows: list[int] | None = None) -> Tensor:
    """A tensor in float32, or some rows of a matrix. Raises ValueError or NotImplementedError where the gguf
    package does not know its type."""
    kind = GGMLQuantizationType(place.type)
    numbers, size = GGML_QUANT_SIZES[kind]
    width = place.shape[-1] // numbers * size
    data = np.memmap(place.file, np.uint8, "r", place.offset, (int(np.prod(place.shape[:-1])), width))
    floats = torch.from_numpy(dequantize(np.array(data if rows is None else data[rows]), kind))
    return floats.view(*(place.shape[:-1] if rows is None else [len(rows)]), place.shape[-1])
