"""A tiny model of each of transformers' causal types, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from scheduler.models.checks.small_copy import randomize, small_copy
from scheduler.models.model_config import auto_class

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

MIXED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]

INDEXED = {
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
    "indexer_head_dim": 16,
    "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}

ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm-roberta", "xlm-roberta-xl"),
)
"""What was an encoder first, and is made a decoder by its configuration."""

BY_TYPE: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in ENCODERS},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"head_dim": 32},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xlnet": {"d_head": 16, "d_inner": 96},
    "xlstm": {"embedding_dim": 64, "num_blocks": 4},
    "zamba": {"layers_block_type": MIXED, "mamba_dt_rank": 8, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": MIXED, "hybrid_layer_ids": [1, 3], "kv_channels": 32, "num_query_groups": 4},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen4_exp": INDEXED,
    "qwen4_exp_text": INDEXED,
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
}
"""What the default configuration of a type lacks or makes too large, in that of its decoder."""


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """With `changes` in its configuration. Raises whatever the type's classes do where there is none."""
    sizes = {**IDS, **BY_TYPE.get(model_type, {}), **changes}
    config = small_copy(AutoConfig.for_model(model_type), **sizes)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model
