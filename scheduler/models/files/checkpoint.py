"""Where a model's weights are read from: one tensor at a time, by the name that transformers gives it.

Loading holds one tensor beside what is already packed, so that a model needs no more memory while it loads than
when it runs. A GGUF file's blocks of quantized weights are handed on as they are.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from scheduler.models.files.gguf_architectures import INTERLEAVED, scale_positions
from scheduler.models.files.gguf_file import Bytes, GgufFile

STORED_TYPES = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
"""Block types that the kernels multiply as they are. What else a file may have is made float32."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_OTHERS = {
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
_TYPES = _FLOATS | _OTHERS


TEXT_PREFIXES = {
    **{"model.language_model.": "model.", "language_model.model.": "model."},
    **{"language_model.lm_head.": "lm_head.", "lm_head.": "lm_head."},
}
"""Under which checkpoints of several parts have the decoder's weights, and what these are called without the
others; the second form is older."""


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

BASE_EMBEDDING = "embed_tokens.weight"
"""What the former is called in a checkpoint of a decoder without its head, as models for embeddings have it."""


ROPE_FACTORS = "rope_freqs.weight"

SHOWN = 3
"""Weights that a message names."""

OTHER_FACTORS = "its GGUF file has factors for a rotary embedding that the model does not have"


class CheckpointError(ValueError):
    """The weights cannot be read, or are not those of this model; the message says why."""


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A matrix in a GGUF file's own quantized blocks."""

    data: Tensor
    """[rows, bytes of a row] uint8; may lie in a file that is mapped into memory, which is never written."""
    type: str


Weight = Tensor | StoredBlocks


def check_complete(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises `CheckpointError` for weights that a checkpoint lacks, or has and the model does not."""
    for names, what in ((sorted(missing), "lacks"), (sorted(unexpected), "has, unlike this model,")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise CheckpointError(f"the checkpoint {what} {', '.join(names[:SHOWN])}{more}")


def other_shape(name: str, stored: Sequence[int], expected: Sequence[int]) -> str:
    """What to say of a weight whose shape is another than its model's configuration asks for."""
    return f"{name} has the shape {list(stored)} in the file, and {list(expected)} by the config"


class Checkpoint(Protocol):
    """The weights of one model."""

    is_quantized: bool
    """Whether it has stored blocks."""

    def __contains__(self, name: str) -> bool: ...

    def weight(self, name: str) -> Weight:
        """One weight, in memory of its own where it has to be read."""

    def table(self, name: str) -> Weight:
        """The same for a weight of which single rows are looked up: it may stay in its file."""


@runtime_checkable
class NamedWeights(Protocol):
    """A checkpoint that knows what it has."""

    @property
    def names(self) -> list[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def weight(self, name: str) -> Tensor: ...


class SafetensorsCheckpoint:
    """One safetensors file, or the several that an index names.

    The files' headers are read here: tensors of the library's own reader lie in a mapping of the whole file, which
    would stay in memory beside the packed weights.
    """

    is_quantized = False

    def __init__(self, files: list[Path]) -> None:
        self._places: dict[str, tuple[Path, torch.dtype, list[int], int]] = {}
        self.names: list[str] = []
        """Of all tensors, also those whose type is not read here."""
        for file in files:
            header, length = _header(file)
            self.names += [name for name in header if name != "__metadata__"]
            for name, entry in header.items():
                if name != "__metadata__" and (dtype := _TYPES.get(entry["dtype"])) is not None:
                    start, _ = entry["data_offsets"]
                    self._places[name] = (file, dtype, entry["shape"], 8 + length + start)

    def __contains__(self, name: str) -> bool:
        return name in self._places and self._places[name][1] in _FLOATS.values()

    def weight(self, name: str) -> Tensor:
        return self.raw(name)

    def raw(self, name: str) -> Tensor:
        """A tensor of any type."""
        file, dtype, shape, offset = self._places[name]
        count = math.prod(shape) * dtype.itemsize
        data = torch.from_numpy(np.fromfile(file, dtype=np.uint8, count=count, offset=offset))
        return data.view(dtype).view(shape)

    def table(self, name: str) -> Tensor:
        return self.weight(name)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Of a safetensors file, and its length. Raises `CheckpointError` where the file is not whole."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: this is no safetensors file, or only its beginning") from error
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise CheckpointError(f"{file} is damaged: it has {size:,} bytes of {needed:,}; copy or download it again")
    return header, length


class GgufCheckpoint:
    """A GGUF file. Its tensors are those of transformers under other names, apart from the order of some rows and
    from Gemma's norms. So it is for the architectures of fused_model.py and gguf_architectures.py; others may
    differ in more."""

    def __init__(self, file: GgufFile) -> None:
        architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if file.architecture not in architectures:
            raise CheckpointError(f"{file.path}: {file.architecture!r} is no architecture that is known here")
        self._file = file
        self._names = gguf.get_tensor_name_map(
            architectures[file.architecture], file.of_architecture("block_count") or 0
        )
        self.is_quantized = any(tensor.type.name in STORED_TYPES for tensor in file.tensors.values())

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self._file.tensors

    def weight(self, name: str) -> Weight:
        return self._weight(name, self._file.read)

    def table(self, name: str) -> Weight:
        return self._weight(name, self._file.map)

    def floats(self, name: str) -> Tensor:
        """In float32."""
        weight = self.weight(name)
        if isinstance(weight, StoredBlocks):
            weight = _dequantized(weight.data.numpy(), GGMLQuantizationType[weight.type])
        return weight.float()

    def scale_positions(self, config: Any) -> None:
        """Give a decoder's configuration the scaling of positions that the file has. Raises `GgufError`."""
        scale_positions(config, self._file)

    def left_out(self, names: Iterable[str]) -> list[str]:
        """Its tensors that are none of the weights of these names."""
        taken = {self._stored_name(name) for name in names}
        return [name for name in self._file.tensors if name not in taken and name != ROPE_FACTORS]

    @property
    def rope_factors(self) -> Tensor | None:
        """What each frequency of the rotary embedding is divided by (Llama 3.1 and later)."""
        if ROPE_FACTORS not in self._file.tensors:
            return None
        return torch.from_numpy(self._file.read(ROPE_FACTORS).view(np.float32).copy())

    def _stored_name(self, name: str) -> str:
        stem, dot, suffix = name.rpartition(".")
        return f"{self._names.get_name(stem)}{dot}{suffix}"

    def _weight(self, name: str, read: Callable[[str], Bytes]) -> Weight:
        stored = self._stored_name(name)
        tensor = self._file.tensors[stored]
        data = self._in_order(stored, read(stored))
        if tensor.type.name in STORED_TYPES and len(tensor.shape) == 2:
            return StoredBlocks(_borrowed(data), tensor.type.name)
        if tensor.type.name in _FLOATS:
            weight = _borrowed(data).view(_FLOATS[tensor.type.name])
        else:
            weight = _dequantized(data, tensor.type)
        # Gemma adds 1 to the weight of a norm; the file has the sum.
        is_shifted = self._file.architecture.startswith("gemma") and stored.endswith("norm.weight")
        return weight.float() - 1.0 if is_shifted else weight

    def _in_order(self, stored: str, rows: Bytes) -> Bytes:
        """Some architectures' files have the two halves of each head's queries and keys interleaved."""
        if self._file.architecture not in INTERLEAVED or not (".attn_q." in stored or ".attn_k." in stored):
            return rows
        heads = self._file.of_architecture("attention.head_count")
        if ".attn_k." in stored:
            heads = self._file.of_architecture("attention.head_count_kv") or heads
        width = rows.shape[1:] if rows.ndim == 2 else (4,)  # a bias is float32
        halves = rows.reshape(heads, -1, 2, *width)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


class RenamedCheckpoint:
    """The decoder's weights by the names that they have in a checkpoint of a decoder with its head: of one that
    also has those for images or sound, or of one that was saved without a head."""

    is_quantized = False

    def __init__(self, whole: NamedWeights) -> None:
        self._whole = whole
        rename = _with_base if BASE_EMBEDDING in whole else _text_name
        self._names = dict(filter(None, map(rename, whole.names)))

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names and self._names[name] in self._whole

    def weight(self, name: str) -> Tensor:
        return self._whole.weight(self._names[name])

    def table(self, name: str) -> Tensor:
        return self.weight(name)


def _text_name(name: str) -> tuple[str, str] | None:
    """What a weight is called in the decoder alone, and here; None: it is another part's."""
    for prefix, alone in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return alone + name.removeprefix(prefix), name
    return None


def _with_base(name: str) -> tuple[str, str]:
    return name if name.startswith("lm_head.") else f"model.{name}", name


class ModuleCheckpoint:
    """The weights of a transformers model that is in memory."""

    is_quantized = False

    def __init__(self, module: nn.Module) -> None:
        self._state: dict[str, Tensor] = module.state_dict()

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def weight(self, name: str) -> Tensor:
        return self._state[name]

    def table(self, name: str) -> Tensor:
        return self._state[name]


def open_checkpoint(path: str) -> SafetensorsCheckpoint | GgufCheckpoint | None:
    """The weights of a folder or a Hugging Face id; None if they are in neither of the two formats. Raises
    `CheckpointError`, `GgufError` or OSError."""
    if (file := gguf_file(path)) is not None:
        return GgufCheckpoint(GgufFile(file))
    from transformers.utils.hub import cached_file

    def find(name: str) -> Path | None:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    if (single := find("model.safetensors")) is not None:
        return SafetensorsCheckpoint([single])
    index = find("model.safetensors.index.json")
    if index is None:
        return None
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [find(part) for part in parts]
    if any(file is None for file in files):
        raise CheckpointError(f"{path}: some of the files that {index.name} names are missing")
    return SafetensorsCheckpoint([file for file in files if file is not None])


def gguf_file(path: str) -> Path | None:
    """The GGUF file that holds the weights of the model in this folder, if that is where they are."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def _dequantized(data: Bytes, kind: GGMLQuantizationType) -> Tensor:
    try:
        return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(data), kind))
    except NotImplementedError as error:
        raise CheckpointError(f"weights of type {kind.name} cannot be read") from error


def _borrowed(data: Bytes) -> Tensor:
    """The same memory as a tensor. torch has no word for memory that must not be written; nothing here does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data)
