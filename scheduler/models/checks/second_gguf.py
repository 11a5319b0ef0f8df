"""A GGUF file read a second time (see second_reader.py): its header, and its blocks of numbers made floats.

The layout of the file and of its blocks is that of ggml (github.com/ggml-org/ggml, docs/gguf.md and
src/ggml-quants.c).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
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
    """A tensor in float32, or some rows of a matrix. Types that the kernels do not know are the gguf package's to
    read, as they are when a model is loaded. Raises ValueError or NotImplementedError where it does not know
    them."""
    numbers, size, make = _BLOCKS.get(place.type) or _other(place.type)
    width = place.shape[-1] // numbers * size
    data = np.memmap(place.file, np.uint8, "r", place.offset, (int(np.prod(place.shape[:-1])), width))
    taken = torch.from_numpy(np.array(data if rows is None else data[rows]))
    return make(taken.view(-1, size)).view(*(place.shape[:-1] if rows is None else [len(rows)]), place.shape[-1])


Blocks = tuple[int, int, Callable[[Tensor], Tensor]]
"""Numbers in a block, its bytes, and what they stand for."""


def _other(number: int) -> Blocks:
    import gguf

    kind = gguf.GGMLQuantizationType(number)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return numbers, size, lambda blocks: torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _low_then_high(data: Tensor) -> Tensor:
    return torch.cat((data % 16, data // 16), dim=1).float()


def _fifth_bits(data: Tensor) -> Tensor:
    """Of 32 numbers, 16 to be added where it is set."""
    return 16.0 * (data.repeat_interleave(8, 1) // 2 ** torch.arange(8).repeat(4) % 2)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_low_then_high(blocks[:, 2:]) - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _low_then_high(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return (_low_then_high(blocks[:, 6:]) + _fifth_bits(blocks[:, 2:6]) - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    return (_low_then_high(blocks[:, 8:]) + _fifth_bits(blocks[:, 4:8])) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Of 12 bytes: eight scales and eight minima, [blocks, 8, 1] each."""
    first, second, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first % 64, rest % 16 + first // 64 * 16), dim=1)
    minima = torch.cat((second % 64, rest // 16 + second // 64 * 16), dim=1)
    return scales.float().unsqueeze(2), minima.float().unsqueeze(2)


def _of_eight(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Eight times 32 numbers with scales and minima of their own: Q4_K and Q5_K."""
    scales, minima = _six_bits(blocks[:, 4:16])
    whole, least = _half(blocks, 0).unsqueeze(2), _half(blocks, 2).unsqueeze(2)
    return numbers * (whole * scales) - least * minima


def _four_k(data: Tensor) -> Tensor:
    quarters = data.reshape(-1, 4, 1, 32)
    return torch.cat((quarters % 16, quarters // 16), dim=2).reshape(-1, 8, 32).float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_eight(blocks, _four_k(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = blocks[:, 16:48].unsqueeze(1) // 2 ** torch.arange(8).view(1, 8, 1) % 2
    return _of_eight(blocks, _four_k(blocks[:, 48:]) + 16.0 * fifth)


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low % 16, low // 16), dim=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) // 4 ** torch.arange(4).view(1, 1, 4, 1) % 4
    numbers = (low + 16 * high).float().reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float().unsqueeze(2)
    return numbers * (_half(blocks, 208).unsqueeze(2) * scales)


def _of_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda data: data.contiguous().view(dtype).float()


_BLOCKS: dict[int, Blocks] = {
    0: (1, 4, _of_type(torch.float32)),
    1: (1, 2, _of_type(torch.float16)),
    30: (1, 2, _of_type(torch.bfloat16)),
    2: (32, 18, _q4_0),
    3: (32, 20, _q4_1),
    6: (32, 22, _q5_0),
    7: (32, 24, _q5_1),
    8: (32, 34, _q8_0),
    12: (256, 144, _q4_k),
    13: (256, 176, _q5_k),
    14: (256, 210, _q6_k),
}
"""By ggml's number of a type."""
