"""The families that people run most, as one native call a step.

The general path (paged_model.py) runs transformers' modules: some forty small operators a layer. For the Llama
family the native decoder (kernels/decoder.cpp) does the whole forward pass over weights that are packed once.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepOutput
from scheduler.core.step import SinkShift
from scheduler.kernels.native import kernels
from scheduler.models.fused.fused_weights import FAMILIES, DecoderWeights
from scheduler.models.fused.outline import Outline, RopeTables, rope_kind

MULTIPLE = 16
"""Of numbers, that what a native product takes has."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def can_fuse(config: PretrainedConfig, layers: list[LayerSpec]) -> bool:
    """Whether the native decoder runs this model: its family, its activation, one shape of attention, sizes that
    fill registers."""
    shapes = {(spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.scaling, spec.softcap) for spec in layers}
    if config.model_type not in FAMILIES or _activation(config) not in _ACTIVATIONS or len(shapes) != 1:
        return False
    widths = (config.hidden_size, config.intermediate_size, layers[0].num_heads * layers[0].key_dim)
    return all(width % MULTIPLE == 0 for width in widths)


def shift_obstacle(config: PretrainedConfig, layers: list[LayerSpec]) -> str:
    """Why no tokens can be dropped from the middle of this model's context; empty: they can."""
    if any(spec.sliding_window is not None for spec in layers):
        return "layers of this model have sliding windows, which drop what is long past by themselves"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"this model's rotary embedding ({kind}) changes with the length of the context"
    return ""


class FusedModel:
    """What PagedModel is, for the families in `FAMILIES`: the same tokens in far fewer calls.

    A row's logits have the same bits whatever else is in the batch, in every mode.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        outline: Outline,
        weights: DecoderWeights,
        num_threads: int,
    ) -> None:
        self.layers: list[LayerSpec] = outline.layers
        self._config = config
        self._outline = outline
        self._weights = weights
        self._num_threads = num_threads

    def bind(self, cache: KVCache, max_len: int) -> None:
        """Make the decoder, with as many angles as the longest sequence has tokens."""
        self._cache = cache
        self._ropes = self._outline.tables(max_len)
        self._decoder = make_decoder(self._config, self._outline, self._weights, self._ropes)
        keys, values, groups = zip(*cache.layers, strict=True)
        self._decoder.bind_cache(list(keys), list(values), list(groups))

    def forward(self, batch: PackedBatch) -> StepOutput:
        """One step: write the batch's KV, and return what its rows give, in float32."""
        logits, states = self._decoder.forward(
            batch.input_ids.int(),
            batch.positions,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            batch.sample_rows.int(),
            batch.read_rows.int(),
            self._num_threads,
        )
        return StepOutput(logits, states)

    @torch.inference_mode()
    def shift_sink(self, shift: SinkShift) -> None:
        """Turn a block's keys on by some positions, in float32 and rounded once, into another block."""
        cos, sin = next(iter(self._ropes.values()))
        scaling = cos[0, 0]  # that of a position 0, where there is nothing else
        cosines, sines = (cos[shift.distance] / scaling)[:, None], (sin[shift.distance] / scaling)[:, None]
        width = len(cosines)
        for layer in self._cache.layers:  # keys are [block, head, dimension, token]
            keys = layer.keys[shift.source].float()
            rotary, rest = keys[:, :width], keys[:, width:]
            halves = torch.cat((-rotary[:, width // 2 :], rotary[:, : width // 2]), dim=1)
            turned = rotary * cosines + halves * sines
            layer.keys[shift.target] = torch.cat((turned, rest), dim=1).to(layer.keys.dtype)
            layer.values[shift.target] = layer.values[shift.source]


def make_decoder(
    config: PretrainedConfig, outline: Outline, weights: DecoderWeights, ropes: RopeTables, first: int = 0
) -> Any:
    """The native decoder over these weights, for contexts as long as the tables of its rotary embeddings. `first`:
    which of the model's layers the first one here is."""
    spec = outline.layers[0]
    kinds = list(ropes)
    decoder = kernels().decoder(
        weights.embedding,
        weights.head,
        weights.final_norm,
        list(ropes.values()),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.key_dim,
        norm_epsilon=config.rms_norm_eps,
        attention_scale=spec.scaling,
        attention_softcap=spec.softcap or 0.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        embedding_multiplier=config.hidden_size**0.5 if config.model_type.startswith("gemma") else 1.0,
        activation=_ACTIVATIONS[_activation(config)],
    )
    for index, layer in enumerate(weights.layers, start=first):
        decoder.add_layer(
            **layer,
            sliding_window=outline.layers[index].sliding_window or 0,
            rope=kinds.index(rope_kind(config, index)),
        )
    return decoder


def _activation(config: PretrainedConfig) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name
