"""The kernels of one shared object, for tensors.

Nothing of torch or Python is in the library: a tensor becomes its address, its type and its sizes, and a call is
one struct (api.cpp has them). It lets other threads run meanwhile. What the kernels do not take, a tensor on
another device or of other sizes, raises ValueError.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

# Numbers by which the library knows these, in its order.
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8)
MODES = ("f32", "bf16", "int8", "int4", "stored")
ACTIVATIONS = ("silu", "gelu_tanh")
STORED = ("", "", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

_NUMBERS = {dtype: number for number, dtype in enumerate(TYPES)}
_ARRAY = "Pii4q"
_NO_ARRAY = (0, -1, 0, 0, 0, 0, 0)
_PADDING = ((0, 0, 0, 0), (0, 0, 0), (0, 0), (0,), ())

NORMS = (
    "attention_norm",
    "feed_forward_norm",
    "query_norm",
    "key_norm",
    "post_attention_norm",
    "post_feed_forward_norm",
)
"""Of a layer. A family may have only some."""

# Of each function, the fields of its struct: arrays, but where another kind is named. P is an address, q a whole
# number, d a real one.
_FUNCTIONS = {
    "limit_threads": "threads:q",
    "paged_attention": "q k_cache v_cache block_tables query_start context_lens scale:d softcap:d window:q "
    "chunk:q latent_dim:q threads:q sinks slopes outputs",
    "write_kv": "k v slot_mapping k_cache v_cache latent_dim:q",
    "columns": "data stored:q columns:P",
    "dequantize": "data stored:q values",
    "pack": "parts:P num_parts:q bias mode:q gated:q made:P",
    "sizes": "weights:P sizes:P",
    "linear": "weights:P x activation:q threads:q y",
    "check_alike": "weights:P count:q",
    "grouped_linear": "weights:P num_weights:q x starts:P num_starts:q threads:q y",
    "decoder": "embedding stored:q head:P final_norm cosines:P sines:P num_ropes:q num_heads:q num_kv_heads:q "
    "head_dim:q activation:q norm_epsilon:d attention_scale:d attention_softcap:d logit_softcap:d "
    "embedding_multiplier:d made:P",
    "add_layer": f"decoder:P qkv:P num_qkv:q output:P gate_up:P down:P {' '.join(NORMS)} window:q rope:q",
    "bind_cache": "decoder:P k_caches:P v_caches:P groups:P count:q",
    "forward": "decoder:P token_ids positions block_tables query_start context_lens sampled_rows read_rows "
    "threads:q logits states",
    "argmax": "logits threads:q values tokens",
    "logsumexp": "logits temperatures threads:q sums",
    "draw": "logits temperatures numbers threads:q tokens",
    "draw_truncated": "logits temperatures numbers top_k top_p min_p threads:q tokens",
    "top_candidates": "logits k:q threads:q values tokens",
    "steer": "logits rows penalties seen_starts seen times bias_starts biased biases masks allowed threads:q",
}


def _words(tensor: Tensor, name: str) -> tuple[int, ...]:
    """The fields of an array. The tensor has to outlive what is done with them."""
    sizes = tensor.shape
    number = _NUMBERS.get(tensor.dtype)
    if number is None or len(sizes) >= len(_PADDING):
        raise ValueError(f"{name} is {tensor.dtype} of {len(sizes)} dimensions, which no kernel takes")
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be a CPU tensor")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return tensor.data_ptr(), number, len(sizes), *sizes, *_PADDING[len(sizes)]


class _Function:
    """One of the library's. It takes the fields of its struct in their order, and None for a missing array."""

    def __init__(self, library: ctypes.CDLL, name: str, fields: str) -> None:
        self._function = library[f"carousel_{name}"]
        self._function.argtypes, self._function.restype = [ctypes.c_char_p], c_int
        self._error = library.carousel_error
        kinds = [field.partition(":") for field in fields.split()]
        self._arrays = [None if kind else name for name, _, kind in kinds]
        self._pack = Struct("".join(kind or _ARRAY for _, _, kind in kinds)).pack

    def __call__(self, *arguments: Any) -> None:
        words: list[Any] = []
        for name, argument in zip(self._arrays, arguments, strict=True):
            if name is None:
                words.append(argument)
            else:
                words += _NO_ARRAY if argument is None else _words(argument, name)
        if status := self._function(self._pack(*words)):
            message = self._error().decode(errors="replace")
            raise ValueError(message) if status == 1 else RuntimeError(message)


class Library:
    """A shared object's functions, by their names in `_FUNCTIONS`."""

    def __init__(self, file: Path) -> None:
        """Raises OSError where it cannot be loaded."""
        library = ctypes.CDLL(str(file))
        library.carousel_error.restype = ctypes.c_char_p
        self._functions = {name: _Function(library, name, fields) for name, fields in _FUNCTIONS.items()}
        self.free_weights, self.free_decoder = library.carousel_free_weights, library.carousel_free_decoder
        for free in (self.free_weights, self.free_decoder):
            free.argtypes, free.restype = [c_void_p], None

    def __getattr__(self, name: str) -> _Function:
        return self._functions[name]


def _number_of(what: str, name: str, names: Sequence[str]) -> int:
    if not name or name not in names:
        raise ValueError(f"{what} must be {', '.join(filter(None, names))}, not {name}")
    return names.index(name)


def _several(tensors: Sequence[Tensor], name: str) -> bytes:
    """Arrays one after the other."""
    words = [word for tensor in tensors for word in _words(tensor, name)]
    return Struct(_ARRAY * len(tensors)).pack(*words)


def _address(block: Any) -> int:
    """Of a block of memory, which has to outlive what is done with it."""
    if isinstance(block, bytes):
        return ctypes.cast(ctypes.c_char_p(block), c_void_p).value or 0
    return ctypes.addressof(block)


class StoredMatrix:
    """A weight in one of the block formats of GGUF files: its bytes, [rows, bytes of a row]."""

    def __init__(self, library: Library, data: Tensor, type: str) -> None:
        self._library = library
        self.data = data
        self.stored = _number_of("the type", type, STORED)
        columns = c_int64()
        library.columns(data, self.stored, _address(columns))
        self.rows, self.columns = data.shape[0], columns.value

    def dequantize(self) -> Tensor:
        values = torch.empty(self.rows, self.columns)
        self._library.dequantize(self.data, self.stored, values)
        return values


AnyMatrix = Tensor | StoredMatrix


def _parts(weight: AnyMatrix) -> tuple[Tensor, int]:
    return (weight, 0) if isinstance(weight, Tensor) else (weight.data, weight.stored)


class PackedWeights:
    """Weights [out_features, in_features], stacked from `parts` and packed once for the arithmetic `mode`."""

    def __init__(
        self,
        library: Library,
        parts: Sequence[AnyMatrix],
        bias: Tensor | None,
        mode: str,
        *,
        gated: bool,
    ) -> None:
        words = [word for data, stored in map(_parts, parts) for word in (*_words(data, "weight"), stored)]
        matrices = Struct(f"{_ARRAY}q" * len(parts)).pack(*words)
        handle = c_void_p()
        library.pack(
            _address(matrices), len(parts), bias, _number_of("mode", mode, MODES), gated, _address(handle)
        )
        self.library = library
        self.handle: int = handle.value or 0
        weakref.finalize(self, library.free_weights, self.handle).atexit = False
        sizes = (c_int64 * 3)()
        library.sizes(self.handle, _address(sizes))
        self.in_features, self.out_features, self.nbytes = sizes


def _handles(weights: Sequence[PackedWeights]) -> Any:
    return (c_void_p * len(weights))(*(each.handle for each in weights))


def _floats(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x
    if x.dtype != torch.bfloat16:
        raise ValueError(f"x must be float32 or bfloat16, not {x.dtype}")
    return x.float()


class Product:
    """Of rows [rows, in_features] in float32 or bfloat16 with weights: [rows, out_features] of the same type."""

    def __init__(self, weights: PackedWeights) -> None:
        self._weights = weights
        self._linear = weights.library.linear

    def __call__(self, x: Tensor, activation: str = "silu", num_threads: int = 1) -> Tensor:
        rows = _floats(x)
        y = rows.new_empty(len(x), self._weights.out_features)
        number = _number_of("activation", activation, ACTIVATIONS)
        self._linear(self._weights.handle, rows, number, num_threads, y)
        return y if rows is x else y.to(x.dtype)


class GroupedProduct:
    """Products of rows sorted by their weights: rows [starts[g], starts[g + 1]) are those of weights g."""

    def __init__(self, weights: Sequence[PackedWeights]) -> None:
        if not weights:
            raise ValueError("there must be weights")
        self._weights = list(weights)
        self._handles = _handles(self._weights)
        library = self._weights[0].library
        library.check_alike(_address(self._handles), len(self._weights))
        self._linear = library.grouped_linear
        self.nbytes = sum(each.nbytes for each in self._weights)

    def __call__(self, x: Tensor, starts: Sequence[int], num_threads: int = 1) -> Tensor:
        rows = _floats(x)
        y = rows.new_empty(len(x), self._weights[0].out_features)
        bounds = (c_int64 * len(starts))(*starts)
        self._linear(
            *(_address(self._handles), len(self._weights), rows),
            *(_address(bounds), len(starts), num_threads, y),
        )
        return y if rows is x else y.to(x.dtype)


class Decoder:
    """A whole forward pass of the Llama family in one call (decoder.h)."""

    def __init__(
        self,
        library: Library,
        embedding: AnyMatrix,
        head: PackedWeights,
        final_norm: Tensor,
        ropes: Sequence[tuple[Tensor, Tensor]],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_epsilon: float,
        attention_scale: float,
        attention_softcap: float = 0.0,
        logit_softcap: float = 0.0,
        embedding_multiplier: float = 1.0,
        activation: str = "silu",
    ) -> None:
        """`ropes`: cosines and sines, [positions, rotary_dim] each."""
        cosines = _several([cosines for cosines, _ in ropes], "cos")
        sines = _several([sines for _, sines in ropes], "sin")
        handle = c_void_p()
        library.decoder(
            *(*_parts(embedding), head.handle, final_norm, _address(cosines), _address(sines), len(ropes)),
            *(num_heads, num_kv_heads, head_dim, _number_of("activation", activation, ACTIVATIONS)),
            *(norm_epsilon, attention_scale, attention_softcap, logit_softcap, embedding_multiplier),
            _address(handle),
        )
        self._library = library
        self._handle: int = handle.value or 0
        weakref.finalize(self, library.free_decoder, self._handle).atexit = False
        self._vocabulary = head.out_features
        self._hidden_size = embedding.columns if isinstance(embedding, StoredMatrix) else embedding.shape[1]
        self._borrowed = embedding, list(ropes)
        self._caches: tuple[list[Tensor], list[Tensor]] = [], []

    def add_layer(
        self,
        qkv: Sequence[PackedWeights],
        output: PackedWeights,
        gate_up: PackedWeights,
        down: PackedWeights,
        *,
        sliding_window: int = 0,
        rope: int = 0,
        **norms: Tensor | None,
    ) -> None:
        """`norms`: by the names in `NORMS`; `rope`: which of the tables."""
        if unknown := norms.keys() - set(NORMS):
            raise TypeError(f"a layer has no {', '.join(sorted(unknown))}")
        handles = _handles(qkv)
        self._library.add_layer(
            *(self._handle, _address(handles), len(qkv), output.handle, gate_up.handle, down.handle),
            *map(norms.get, NORMS),
            *(sliding_window, rope),
        )

    def bind_cache(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Where each layer keeps its keys and values, and whose block tables name the blocks."""
        if not len(k_caches) == len(v_caches) == len(groups):
            raise ValueError("there must be as many v_caches and groups as k_caches")
        keys, values = _several(k_caches, "k_cache"), _several(v_caches, "v_cache")
        numbers = (c_int64 * len(groups))(*groups)
        self._library.bind_cache(self._handle, _address(keys), _address(values), _address(numbers), len(groups))
        self._caches = list(k_caches), list(v_caches)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        sampled_rows: Tensor,
        read_rows: Tensor,
        num_threads: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The logits of some rows, and the last hidden states of some."""
        logits = torch.empty(len(sampled_rows), self._vocabulary)
        states = torch.empty(len(read_rows), self._hidden_size)
        self._library.forward(
            *(self._handle, token_ids, positions, block_tables, query_start, context_lens),
            *(sampled_rows, read_rows, num_threads, logits, states),
        )
        return logits, states


class Kernels:
    """All of one library. `version` names its sources and how they were compiled."""

    def __init__(self, file: Path, version: str) -> None:
        """Raises OSError where it cannot be loaded."""
        self.file = file
        self.version = version
        self._library = Library(file)

    def limit_threads(self, threads: int) -> None:
        """From now on at most so many take part in anything."""
        self._library.limit_threads(threads)

    def stored(self, data: Tensor, type: str) -> StoredMatrix:
        """A weight of a GGUF file: see the class."""
        return StoredMatrix(self._library, data, type)

    def pack(
        self, parts: Sequence[AnyMatrix], bias: Tensor | None = None, mode: str = "int8", *, gated: bool = False
    ) -> PackedWeights:
        """Weights that products are made with: see the class."""
        return PackedWeights(self._library, parts, bias, mode, gated=gated)

    def decoder(self, *parts: Any, **options: Any) -> Decoder:
        """See the class."""
        return Decoder(self._library, *parts, **options)

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        sliding_window: int = 0,
        softcap: float = 0.0,
        num_threads: int = 1,
        *,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
        chunk: int = 0,
        latent_dim: int = 0,
    ) -> Tensor:
        """What each query [rows, heads, key_dim] makes of the context that is in the blocks (attention.h)."""
        outputs = q.new_empty(*q.shape[:-1], latent_dim or v_cache.shape[-1])
        self._library.paged_attention(
            *(q, k_cache, v_cache, block_tables, query_start, context_lens, scale, softcap),
            *(sliding_window, chunk, latent_dim, num_threads, sinks, slopes, outputs),
        )
        return outputs

    def write_kv(
        self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, latent_dim: int = 0
    ) -> None:
        """Put keys and values [tokens, heads, size] into their slots."""
        self._library.write_kv(k, v, slot_mapping, k_cache, v_cache, latent_dim)

    # What follows is described in execution/logits.py.

    def argmax(self, logits: Tensor, num_threads: int = 1) -> tuple[Tensor, Tensor]:
        values, tokens = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
        self._library.argmax(logits, num_threads, values, tokens)
        return values, tokens

    def logsumexp(self, logits: Tensor, temperatures: Tensor, num_threads: int = 1) -> Tensor:
        sums = torch.empty(len(logits))
        self._library.logsumexp(logits, temperatures, num_threads, sums)
        return sums

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor, num_threads: int = 1) -> Tensor:
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._library.draw(logits, temperatures, numbers, num_threads, tokens)
        return tokens

    def draw_truncated(
        self,
        logits: Tensor,
        temperatures: Tensor,
        numbers: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        num_threads: int = 1,
    ) -> Tensor:
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._library.draw_truncated(logits, temperatures, numbers, top_k, top_p, min_p, num_threads, tokens)
        return tokens

    def top_candidates(self, logits: Tensor, k: int, num_threads: int = 1) -> tuple[Tensor, Tensor]:
        shape = len(logits), max(k, 0)
        values, tokens = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        self._library.top_candidates(logits, k, num_threads, values, tokens)
        return values, tokens

    def steer(self, logits: Tensor, *parts: Tensor, num_threads: int = 1) -> None:
        """`parts`: what `execution.steering.Steered` has, in its order."""
        self._library.steer(logits, *parts, num_threads)
