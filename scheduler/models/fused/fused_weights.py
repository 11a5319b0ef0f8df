"""The weights of the families that are fused: where each is kept, and packed for the products' arithmetic.

This is the one place that says which families there are. Each thread reads one tensor and
packs it before it reads the next.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from scheduler.kernels.native import kernels
from scheduler.models.files.checkpoint import (
    EMBEDDING,
    HEAD,
    Checkpoint,
    CheckpointError,
    NamedWeights,
    StoredBlocks,
    Weight,
)
from scheduler.models.fused.outline import Outline
from scheduler.models.products import PLAIN_MODES, Mode

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})

COMPUTED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""What old checkpoints have, though it is no weight: it follows from the configuration."""


DecoderLayer = dict[str, Any]
"""Arguments of the native decoder's `add_layer`."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All that the native decoder multiplies with."""

    embedding: Any
    """A float tensor or the kernels' StoredMatrix: rows are looked up."""
    head: Any
    """The kernels' PackedWeights, as the products of `layers` are."""
    final_norm: Tensor
    layers: list[DecoderLayer]
    nbytes: int
    bits: float
    """Of one weight in the products, with its part of the scales."""


def pack_weights(
    config: PretrainedConfig, checkpoint: Checkpoint, mode: Mode, plain: Mode, num_threads: int = 1
) -> DecoderWeights:
    """Pack the weights of a model whose family is in `FAMILIES`. With `mode` stored, what the file has as floats,
    or as rows of different types that one product needs, is multiplied in the arithmetic of `plain`.

    Raises `CheckpointError` if the checkpoint lacks something.
    """
    return Packer(config, checkpoint, mode, plain).pack(num_threads)


def pack_layer(config: PretrainedConfig, checkpoint: Checkpoint, number: int, mode: Mode) -> DecoderLayer:
    """One layer alone. Raises `CheckpointError`."""
    return Packer(config, checkpoint, mode, mode).layer(number)


class Packer:
    def __init__(self, config: PretrainedConfig, checkpoint: Checkpoint, mode: Mode, plain: Mode) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._mode = mode
        self._plain = plain
        self._is_gemma = config.model_type.startswith("gemma")
        self._products: list[tuple[int, int]] = []
        """Bytes and weights of each that is packed."""

    def pack(self, num_threads: int) -> DecoderWeights:
        # The head first: nothing that is read is larger, and nothing else is held yet.
        (head,) = self._product(HEAD if HEAD in self._checkpoint else EMBEDDING)
        embedding = self._embedding(self._read(EMBEDDING, stays_in_file=True))
        if head.out_features != self._config.vocab_size:
            raise CheckpointError(f"it has logits for {head.out_features} tokens, not {self._config.vocab_size}")
        with ThreadPoolExecutor(num_threads) as threads:
            layers = list(threads.map(self.layer, range(self._config.num_hidden_layers)))
        packed, count = (sum(column) for column in zip(*self._products, strict=True))
        return DecoderWeights(
            _for_kernels(embedding),
            head,
            self._norm("model.norm"),
            layers,
            nbytes=packed + (embedding if isinstance(embedding, Tensor) else embedding.data).nbytes,
            bits=8 * packed / count,
        )

    def layer(self, number: int) -> DecoderLayer:
        prefix = f"model.layers.{number}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        (output,) = self._product(f"{attention}o_proj.weight")
        (down,) = self._product(f"{mlp}down_proj.weight")
        (gate_up,) = self._product(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight", gated=True)
        layer: DecoderLayer = {
            "qkv": self._product(*(f"{attention}{name}_proj.weight" for name in "qkv")),
            "output": output,
            "gate_up": gate_up,
            "down": down,
            "attention_norm": self._norm(f"{prefix}input_layernorm"),
        }
        if f"{attention}q_norm.weight" in self._checkpoint:
            layer["query_norm"] = self._norm(f"{attention}q_norm")
            layer["key_norm"] = self._norm(f"{attention}k_norm")
        if self._is_gemma:
            layer["post_attention_norm"] = self._norm(f"{prefix}post_attention_layernorm")
            layer["feed_forward_norm"] = self._norm(f"{prefix}pre_feedforward_layernorm")
            layer["post_feed_forward_norm"] = self._norm(f"{prefix}post_feedforward_layernorm")
        else:  # what the Llama family calls post-attention is the norm before the feed-forward part
            layer["feed_forward_norm"] = self._norm(f"{prefix}post_attention_layernorm")
        return layer

    def _product(self, *names: str, gated: bool = False) -> list[Any]:
        """The weights of one product, stacked. Stored blocks of different types are packed apart, unless they are
        the gate and what it gates, which belong together."""
        parts = [(name, self._read(name)) for name in names]
        kinds = {_kind(weight) for _, weight in parts}
        apart = self._mode == "stored" and not gated and len(kinds) > 1
        runs = [list(run) for _, run in groupby(parts, lambda part: _kind(part[1]))] if apart else [parts]
        mode = self._mode
        if mode == "stored" and gated and len(kinds) > 1:
            mode = self._plain
        return [self._packed(run, mode, gated) for run in runs]

    def _packed(self, parts: list[tuple[str, Weight]], mode: Mode, gated: bool) -> Any:
        if mode == "stored" and not any(isinstance(weight, StoredBlocks) for _, weight in parts):
            mode = self._plain
        packed = kernels().pack(
            [_for_kernels(weight) for _, weight in parts], self._bias(parts), mode, gated=gated
        )
        count = packed.in_features * sum(_num_rows(weight) for _, weight in parts)
        self._products.append((packed.nbytes, count))
        return packed

    def _bias(self, parts: list[tuple[str, Weight]]) -> Tensor | None:
        """The biases of the parts; zeros where only others have one."""
        names = [name.removesuffix("weight") + "bias" for name, _ in parts]
        if not any(name in self._checkpoint for name in names):
            return None
        return torch.cat(
            [
                self._floats(name) if name in self._checkpoint else torch.zeros(_num_rows(weight))
                for name, (_, weight) in zip(names, parts, strict=True)
            ]
        )

    def _embedding(self, weight: Weight) -> Weight:
        """bfloat16 holds what products of less than float32 can tell apart."""
        if isinstance(weight, StoredBlocks) or weight.dtype == torch.bfloat16:
            return weight
        return weight.float() if self._plain == "f32" else weight.bfloat16()

    def _norm(self, name: str) -> Tensor:
        """A norm's weight, float32. Gemma stores what to add to 1."""
        weight = self._floats(f"{name}.weight")
        return weight + 1.0 if self._is_gemma else weight

    def _floats(self, name: str) -> Tensor:
        weight = self._read(name)
        if not isinstance(weight, Tensor):
            raise CheckpointError(f"{name} is quantized, which is known of matrices only")
        return weight.float().contiguous()

    def _read(self, name: str, *, stays_in_file: bool = False) -> Weight:
        if name not in self._checkpoint:
            raise CheckpointError(f"its checkpoint has no {name}")
        return self._checkpoint.table(name) if stays_in_file else self._checkpoint.weight(name)


def _kind(weight: Weight) -> str:
    return weight.type if isinstance(weight, StoredBlocks) else "float"


def _num_rows(weight: Weight) -> int:
    return (weight if isinstance(weight, Tensor) else weight.data).shape[0]


def _for_kernels(weight: Weight) -> Any:
    if isinstance(weight, StoredBlocks):
        return kernels().stored(weight.data, weight.type)
    return weight.contiguous() if weight.dtype in PLAIN_MODES else weight.float()


def missing_weights(config: PretrainedConfig, outline: Outline, checkpoint: Checkpoint) -> list[str]:
    """The names of the model's weights that the checkpoint does not have."""
    return [name for name in _names(config, outline) if name not in checkpoint]


def unexpected_weights(config: PretrainedConfig, outline: Outline, checkpoint: Checkpoint) -> list[str]:
    """Those that a checkpoint has and the model does not. Of GGUF files nothing is said: they have more than
    weights."""
    if not isinstance(checkpoint, NamedWeights):
        return []
    known = {*_names(config, outline), HEAD}
    return [name for name in checkpoint.names if name not in known and not name.endswith(COMPUTED)]


def _names(config: PretrainedConfig, outline: Outline) -> list[str]:
    is_tied = config.tie_word_embeddings  # a file that has a head all the same means it
    return [name for name in outline.weights if not (is_tied and name == HEAD)]
