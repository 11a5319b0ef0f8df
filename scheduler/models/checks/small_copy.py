"""A small copy of a model's configuration: every kind of layer that it has, narrow, with short windows.

What a model does with a batch, a cache and a window can be seen in a small copy with random weights, in a fraction
of a second. Types differ in what they call their sizes: the names that transformers' configurations use are below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

HIDDEN, HEADS, FEW_HEADS, HEAD_DIM, ROTARY_DIM, INNER = 64, 4, 2, 16, 8, 96

VOCABULARY, LONGEST = 199, 512

WINDOW, CHUNK = 20, 24
"""In tokens, of attention that sees no more."""

LAYERS = 4
"""Of a model all of whose layers are alike."""

OF_A_KIND = 2
"""Layers of each kind, where there are several."""

DEPTHS: tuple[str, ...] = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
)

QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")

FEWER_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "num_query_groups")

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "unpadded_vocab_size", "n_words"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size", "dim_model", "emb_dim"), HIDDEN
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "shared_intermediate_size"), INNER),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "intermediate_size_mlp"), INNER),
    **dict.fromkeys((*QUERY_HEADS, "encoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(
        ("head_dim", "kv_channels", "attention_head_dim", "attention_head_size", "dim_head"), HEAD_DIM
    ),
    "global_head_dim": 2 * HEAD_DIM,
    "rotary_dim": ROTARY_DIM,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), HEAD_DIM),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), LONGEST),
    **dict.fromkeys(
        ("sliding_window", "attention_window", "window_size", "local_attention", "sliding_window_size"), WINDOW
    ),
    **dict.fromkeys(("attention_chunk_size", "attention_window_size"), CHUNK),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32
    ),
    **dict.fromkeys(("shared_expert_intermediate_size", "ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "altup_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "q_lora_rank": 24,
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("index_n_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    "index_topk": LONGEST,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_state_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "adapter_rank"), 8),
    "num_kv_shared_layers": 1,
    "qk_head_dim": 2 * HEAD_DIM,
    **dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 16),
    "lru_width": HIDDEN,
    "zero_expert_num": 2,
}

PER_LAYER = "per_layer_config"


def small_copy(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Of a whole configuration, with `changes` in that of its decoder. Raises whatever the type's own class does,
    where these sizes do not fit together."""
    known = config.to_dict()
    shrunk = _shrunk(known)
    parts = [shrunk[name] for name in ("text_config", "decoder") if isinstance(shrunk.get(name), dict)]
    (parts[0] if parts else shrunk).update(changes)
    made: PretrainedConfig = AutoConfig.for_model(**shrunk) if config.model_type else type(config)(**shrunk)
    return made


def randomize(model: PreTrainedModel) -> None:
    """Give it weights with which attention and logits differ from token to token, always the same ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5)
            elif not weight.any():
                nn.init.normal_(weight, std=0.1)


def _shrunk(known: dict[str, Any]) -> dict[str, Any]:
    depth = next((known[name] for name in DEPTHS if isinstance(known.get(name), int)), 0)
    kept = _kept_layers(known, depth)
    small = {name: _small(name, value, depth, kept) for name, value in known.items()}
    query = next((known[name] for name in QUERY_HEADS if isinstance(known.get(name), int)), 0)
    for name in FEWER_HEADS:
        if isinstance(known.get(name), int):
            small[name] = HEADS if known[name] == query else 1 if known[name] == 1 else FEW_HEADS
    if isinstance(known.get("qk_rope_head_dim"), int) and "head_dim" in known:
        # What a latent attention's rotary embedding goes by: that part of a head, or a share of the whole.
        is_whole = known["head_dim"] == known["qk_rope_head_dim"] + known.get("qk_nope_head_dim", 0)
        small["head_dim"] = 2 * HEAD_DIM if is_whole else HEAD_DIM
    if known.get("mamba_d_ssm") is not None:
        small["mamba_d_head"] = 16
    if isinstance(known.get("attention_hidden_size"), int):
        small["attention_hidden_size"] = HIDDEN * known["attention_hidden_size"] // known["hidden_size"]
        if isinstance(known.get("attention_head_dim"), int):
            small["attention_head_dim"] = small["attention_hidden_size"] // HEADS
    if "state_size" in known and "expand" in known and isinstance(known.get("num_heads"), int):
        small["num_heads"] = known["expand"] * HIDDEN // HEAD_DIM
    if isinstance(known.get("rope_parameters"), dict):
        factor = known.get("partial_rotary_factor") or 1.0
        small["rope_parameters"] = _small_rope(known["rope_parameters"], small.get("head_dim") or HEAD_DIM, factor)
    if isinstance(known.get(PER_LAYER), dict):
        small[PER_LAYER] = {
            str(place): {name: SIZES.get(name, value) for name, value in layer.items()}
            for place, number in enumerate(kept)
            if (layer := known[PER_LAYER].get(str(number), known[PER_LAYER].get(number))) is not None
        }
    return small


def _small(name: str, value: Any, depth: int, kept: list[int]) -> Any:
    if isinstance(value, dict) and (name.endswith("config") or name == "decoder"):
        return _shrunk(value)
    if name in DEPTHS and isinstance(value, int) and depth:
        return len(kept)
    if isinstance(value, list) and depth and len(value) == depth:
        return [value[layer] for layer in kept]
    if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
        return min(value, SIZES[name]) if value > 0 else value
    if name.endswith("token_id") and isinstance(value, int):
        return min(value, VOCABULARY - 1)
    return value


def _kept_layers(known: dict[str, Any], depth: int) -> list[int]:
    """Some of each kind of layer, in their order."""
    lists = [value for value in known.values() if isinstance(value, list) and depth and len(value) == depth]
    kinds = [str(kind) for kind in zip(*lists, strict=True)] if lists else [""] * depth
    kept = [layer for layer in range(depth) if kinds[:layer].count(kinds[layer]) < OF_A_KIND]
    missing = [layer for layer in range(depth) if layer not in kept]
    return sorted(kept + missing[: max(0, LAYERS - len(kept))])


def _small_rope(rope: dict[str, Any], head_dim: int, factor: float) -> dict[str, Any]:
    """What has an entry for each frequency gets as many as there are."""
    if rope and all(isinstance(value, dict) for value in rope.values()):
        return {kind: _small_rope(value, head_dim, factor) for kind, value in rope.items()}
    count = int(head_dim * (rope.get("partial_rotary_factor") or factor)) // 2
    small = dict(rope)
    for name, value in rope.items():
        if name in ("short_factor", "long_factor") and isinstance(value, list):
            small[name] = (value * count)[:count]
        elif name == "mrope_section" and isinstance(value, list):
            rest = [count // len(value)] * (len(value) - 1)
            small[name] = [count - sum(rest), *rest]
        elif name == "original_max_position_embeddings":
            small[name] = min(value, LONGEST)
    return small
