"""The families that people run most, as one native call a step.

The general path (model.py) runs transformers' modules: some forty small operators a layer. For the Llama family
the native decoder (kernels/decoder.cpp) does the whole forward pass over the same weights, packed once for the
products' arithmetic: int8, bfloat16 or float32. This is the one place that says which families have it, and where
each keeps its weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.kv_cache import KVCache
from scheduler.model import PagedModel
from scheduler.native import kernels

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})

Mode = Literal["int8", "bf16", "f32"]
"""Arithmetic of the products. int8: weights of each output channel and activations of each row in groups of 64
with a scale each; the sums of a group have 32 bits."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def can_fuse(model: PagedModel) -> bool:
    """Whether the native decoder runs this model: its family, its activation, one shape of attention."""
    config = model.config
    shapes = {
        (spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.scaling, spec.softcap) for spec in model.layers
    }
    return (
        config.model_type in FAMILIES
        and model.device.type == "cpu"
        and _activation(config) in _ACTIVATIONS
        and len(shapes) == 1
    )


class FusedModel:
    """What PagedModel is, for the families in `FAMILIES`: the same tokens in far fewer calls.

    A row's logits have the same bits whatever else is in the batch, in every mode. The transformers model can be
    freed once this is made; only its embedding stays.
    """

    def __init__(self, model: PagedModel, mode: Mode, *, max_len: int, num_threads: int) -> None:
        self.layers: list[LayerSpec] = model.layers
        self._num_threads = num_threads
        self._decoder = make_decoder(model, mode, max_len)
        self._bound: KVCache | None = None

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """One step: write the batch's KV, and return the float32 logits of its sample rows,
        [number of sampled sequences, vocabulary]."""
        if cache is not self._bound:
            keys, values = zip(*cache.layers, strict=True)
            self._decoder.bind_cache(list(keys), list(values))
            self._bound = cache
        logits: Tensor = self._decoder.forward(
            batch.input_ids.int(),
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            batch.sample_rows.int(),
            self._num_threads,
        )
        return logits


def make_decoder(model: PagedModel, mode: Mode, max_len: int) -> Any:
    """The native decoder over this model's weights, for contexts of up to `max_len` tokens."""
    config, spec = model.config, model.layers[0]
    causal_lm: Any = model.module
    is_gemma = config.model_type.startswith("gemma")
    embedding = causal_lm.model.embed_tokens.weight.detach()
    kinds = list(dict.fromkeys(_rope_kind(config, layer) for layer in range(len(model.layers))))
    decoder = kernels().Decoder(
        embedding.float().contiguous() if mode == "f32" else embedding.bfloat16().contiguous(),
        causal_lm.lm_head.weight.detach(),
        _norm(causal_lm.model.norm, is_gemma),
        [_rope_table(causal_lm, kind, max_len) for kind in kinds],
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.key_dim,
        norm_epsilon=config.rms_norm_eps,
        attention_scale=spec.scaling,
        attention_softcap=spec.softcap or 0.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        embedding_multiplier=config.hidden_size**0.5 if is_gemma else 1.0,
        activation=_ACTIVATIONS[_activation(config)],
        mode=mode,
        head_mode=mode,
    )
    for index, layer in enumerate(causal_lm.model.layers):
        decoder.add_layer(
            **_layer_weights(layer, is_gemma),
            sliding_window=model.layers[index].sliding_window or 0,
            rope=kinds.index(_rope_kind(config, index)),
        )
    return decoder


def _activation(config: PretrainedConfig) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _layer_weights(layer: Any, is_gemma: bool) -> dict[str, Tensor | None]:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _stack(mlp.gate_proj, mlp.up_proj)
    output, output_bias = _stack(attention.o_proj)
    down, down_bias = _stack(mlp.down_proj)
    weights: dict[str, Tensor | None] = {
        "qkv": qkv,
        "qkv_bias": qkv_bias,
        "output": output,
        "output_bias": output_bias,
        "gate_up": gate_up,
        "gate_up_bias": gate_up_bias,
        "down": down,
        "down_bias": down_bias,
        "attention_norm": _norm(layer.input_layernorm, is_gemma),
    }
    if hasattr(attention, "q_norm"):
        weights["query_norm"] = _norm(attention.q_norm, is_gemma)
        weights["key_norm"] = _norm(attention.k_norm, is_gemma)
    if is_gemma:
        weights["post_attention_norm"] = _norm(layer.post_attention_layernorm, is_gemma)
        weights["feed_forward_norm"] = _norm(layer.pre_feedforward_layernorm, is_gemma)
        weights["post_feed_forward_norm"] = _norm(layer.post_feedforward_layernorm, is_gemma)
    else:  # what the Llama family calls post-attention is the norm before the feed-forward part
        weights["feed_forward_norm"] = _norm(layer.post_attention_layernorm, is_gemma)
    return weights


def _stack(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach().float() for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _norm(norm: Any, is_gemma: bool) -> Tensor:
    """A norm's weight, float32. Gemma stores what to add to 1."""
    weight: Tensor = norm.weight.detach().float()
    return weight + 1.0 if is_gemma else weight.contiguous()


def _rope_kind(config: PretrainedConfig, layer: int) -> str | None:
    """Which of the model's rotary embeddings a layer uses, where there is a choice."""
    return str(config.layer_types[layer]) if config.model_type == "gemma3_text" else None


@torch.inference_mode()
def _rope_table(causal_lm: PreTrainedModel, kind: str | None, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [positions, rotary_dim] float32."""
    arguments = () if kind is None else (kind,)
    rotary: Any = causal_lm.model.rotary_emb
    cos, sin = rotary(torch.empty(0), torch.arange(positions)[None], *arguments)
    return cos[0].contiguous(), sin[0].contiguous()
