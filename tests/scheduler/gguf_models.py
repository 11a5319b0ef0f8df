"""Writes a transformers model as a GGUF file, as llama.cpp's converter does for the families that are fused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""Where a file's name for a family is not transformers'."""


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kinds: dict[str, str],
    more: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Write `model`, its matrices quantized to `kinds[what the tensor's name ends with]`, or else to
    `kinds[""]`, and `more` tensors that are none of its weights."""
    config: Any = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    if (rope := getattr(config, "rope_parameters", {})).get("rope_type") == "llama3":
        size = config.head_dim
        scaled: Any = model.get_buffer("model.rotary_emb.inv_freq")
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
        writer.add_tensor("rope_freqs.weight", plain / scaled.numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, dot, suffix = name.rpartition(".")
        stored = f"{names.get_name(stem)}{dot}{suffix}"
        data = tensor.float().numpy()
        if architecture == "llama" and (".attn_q." in stored or ".attn_k." in stored):
            heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
            data = _interleave(data, heads)
        if architecture.startswith("gemma") and stored.endswith("norm.weight"):
            data = data + np.float32(1)
        kind = "F32"
        if data.ndim == 2:
            kind = next((kinds[end] for end in kinds if end and stored.endswith(end)), kinds[""])
        number = GGMLQuantizationType[kind]
        writer.add_tensor(stored, gguf.quants.quantize(data, number), raw_dtype=number)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
