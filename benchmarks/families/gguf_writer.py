"""Writes a transformers model as a GGUF file, as llama.cpp's converter does for families whose weights it leaves
as they are, but for the order of some rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "cohere": "command-r",
    "ministral3": "mistral3",
}
"""Where a file's name for a family is not transformers'."""


INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")
"""Architectures whose files have the two halves of each head's queries and keys interleaved."""

SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose models add 1 to the weight of a norm; a file has the sum."""


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kinds: dict[str, str],
    more: Mapping[str, npt.NDArray[np.float32]] | None = None,
    blocks: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Write `model`, its matrices quantized to `kinds[what the tensor's name ends with]`, or else to
    `kinds[""]`, and `more` tensors that are none of its weights. `blocks`: of matrices that are quantized already,
    by their names in the model. `vocabulary` writes a tokenizer."""
    config: Any = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _write_own(writer, config, head_dim)
    if vocabulary is not None:
        vocabulary(writer)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    rope = getattr(config, "rope_parameters", None) or {}
    _write_positions(writer, rope.get("full_attention", rope))
    if rope.get("rope_type") == "llama3":
        size = config.head_dim
        scaled: Any = model.get_buffer("model.rotary_emb.inv_freq")
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
        writer.add_tensor("rope_freqs.weight", plain / scaled.numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, dot, suffix = name.rpartition(".")
        known = names.get_name(stem)
        if known is None:
            raise ValueError(f"{architecture} has no name for {name}")
        stored = f"{known}{dot}{suffix}"
        data = tensor.float().numpy()
        if architecture in INTERLEAVED and (".attn_q." in stored or ".attn_k." in stored):
            heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
            data = _interleave(data, heads)
        if architecture in SHIFTED and stored.endswith("norm.weight"):
            data = data + np.float32(1)
        kind = "F32"
        if data.ndim == 2 and not stored.endswith("norm.weight"):
            kind = next((kinds[end] for end in kinds if end and stored.endswith(end)), kinds[""])
        number = GGMLQuantizationType[kind]
        if blocks and name in blocks:
            stored_blocks = blocks[name]
            if architecture in INTERLEAVED and (".attn_q." in stored or ".attn_k." in stored):
                stored_blocks = _interleave(stored_blocks, heads)
            writer.add_tensor(stored, stored_blocks, raw_dtype=number)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(data, number), raw_dtype=number)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_own(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    """What some architectures have and others do not."""
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "cohere":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_logit_scale(config.logit_scale)
    if config.model_type == "glm4":
        writer.add_rope_dimension_count(int(head_dim * config.rope_parameters["partial_rotary_factor"]))
    if config.model_type == "ministral3":
        writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])


def copy_tokenizer(source: Path, writer: gguf.GGUFWriter) -> None:
    """That of another file."""
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])


def _write_positions(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1.0))
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])


def _interleave(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
