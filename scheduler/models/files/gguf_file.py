"""Reads what a GGUF file says about itself, and its tensors one at a time.

The reader of the `gguf` package looks at each token of the vocabulary, which takes seconds; this one skips them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from scheduler.models.files.gguf_split import GgufError, split_files

Bytes = npt.NDArray[np.uint8]

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """The rows first, as torch has it."""
    type: GGMLQuantizationType
    offset: int
    """From the start of its file, in bytes."""
    path: Path

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape with the last dimension in bytes."""
        numbers, size = GGML_QUANT_SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // numbers * size)


class GgufFile:
    """The metadata and the tensors of one file, or of all that it was split into, of which `path` is the first.
    Raises `GgufError`, or `OSError` if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        """Arrays of strings (the vocabulary, its merges) are left out."""
        self.tensors: dict[str, StoredTensor] = {}
        for part in split_files(path):
            if part.stat().st_size < 24:
                raise GgufError(f"{part} is no GGUF file: it is too short")
            try:
                self._read_header(part, memoryview(np.memmap(part, dtype=np.uint8, mode="r")))  # type: ignore[arg-type]
            except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
                damage = GgufError(f"{part} is damaged: {error}")
                raise error if isinstance(error, GgufError) else damage from error

    @property
    def architecture(self) -> str:
        name: str = self.metadata.get("general.architecture", "")
        return name

    def of_architecture(self, key: str) -> Any:
        """The value of a key that begins with the architecture's name, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def read(self, name: str) -> Bytes:
        """One tensor's bytes, read into memory: [..., bytes of a row]."""
        tensor = self.tensors[name]
        count = math.prod(tensor.byte_shape)
        data = np.fromfile(tensor.path, dtype=np.uint8, count=count, offset=tensor.offset)
        return data.reshape(tensor.byte_shape)

    def map(self, name: str) -> Bytes:
        """One tensor's bytes, left in the file until they are looked at."""
        tensor = self.tensors[name]
        return np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=tensor.byte_shape)

    def _read_header(self, path: Path, data: memoryview) -> None:
        magic, version, num_tensors, num_keys = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF":
            raise GgufError(f"{path} is no GGUF file")
        if version == 3 << 24:
            raise GgufError(f"{path} is big-endian, made for another kind of processor: convert it again here")
        if version not in (2, 3):
            raise GgufError(f"{path} has version {version} of GGUF; 2 and 3 can be read")
        reader = _Reader(data, at=24)
        for _ in range(num_keys):
            key = reader.string()
            value = reader.value(GGUFValueType(reader.number("<I")))
            if value is not None:
                self.metadata.setdefault(key, value)
        found: dict[str, StoredTensor] = {}
        for _ in range(num_tensors):
            name = reader.string()
            shape = [reader.number("<Q") for _ in range(reader.number("<I"))]
            kind = GGMLQuantizationType(reader.number("<I"))
            found[name] = StoredTensor(tuple(reversed(shape)), kind, reader.number("<Q"), path)
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-reader.at // alignment) * alignment
        for name, tensor in found.items():
            placed = StoredTensor(tensor.shape, tensor.type, start + tensor.offset, path)
            if placed.offset + math.prod(placed.byte_shape) > len(data):
                raise GgufError(f"{path} is cut off: {name} lies beyond its end")
            self.tensors[name] = placed


class _Reader:
    """Takes one value after the other out of the header."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self.at = at

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        self.at += length
        if self.at > len(self._data):
            raise ValueError("it ends within a string")
        return str(self._data[self.at - length : self.at], "utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        kind, length = GGUFValueType(self.number("<I")), self.number("<Q")
        if kind == GGUFValueType.STRING:
            self._skip_strings(length)
            return None
        return [self.value(kind) for _ in range(length)]

    def _skip_strings(self, count: int) -> None:
        data, at, unpack = self._data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at
