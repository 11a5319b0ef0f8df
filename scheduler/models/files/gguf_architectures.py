"""What the keys of a GGUF file mean in transformers' configuration, where transformers does not read them itself:
architectures that it has a model for, and positions that are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.files.gguf_split import GgufError

COMMON = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Of a configuration, by what a file calls it after the name of its architecture."""

INTERLEAVED = frozenset({"llama", "granite", "mistral3", "smollm3"})
"""Architectures whose files have the two halves of each head's queries and keys interleaved, as the authors of
Llama did: llama.cpp's converters of these are made after that of Llama."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Of the files, and what transformers calls it. Keys that a file lacks have the configuration's own values."""

    model_type: str
    more: Mapping[str, str] = field(default_factory=dict)
    """As in `COMMON`."""
    of_tensors: Mapping[str, str] = field(default_factory=dict)
    """What is so if there is a tensor of this name, and not so if there is none."""
    rotates_a_part: bool = False
    """Of each head."""


_BIASED = {"attention_bias": "blk.0.attn_q.bias"}

OWN = {
    "gemma": Architecture("gemma"),
    "olmo2": Architecture("olmo2", of_tensors=_BIASED),
    # Its files do not say which layers have no positions: each fourth, as in transformers' configuration.
    "smollm3": Architecture("smollm3", of_tensors=_BIASED | {"mlp_bias": "blk.0.ffn_up.bias"}),
    "granite": Architecture(
        "granite",
        {
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        of_tensors=_BIASED | {"mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "command-r": Architecture(
        "cohere",
        {"layer_norm_eps": "attention.layer_norm_epsilon", "logit_scale": "logit_scale"},
        of_tensors=_BIASED | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "glm4": Architecture("glm4", of_tensors=_BIASED, rotates_a_part=True),
    "mistral3": Architecture("ministral3"),
}
"""By their names in files."""


def settings(header: GgufFile) -> dict[str, Any]:
    """Arguments of the configuration of an architecture in `OWN`. Raises `GgufError`."""
    own = OWN[header.architecture]
    found = {
        name: value
        for name, key in {**COMMON, **own.more}.items()
        if (value := header.of_architecture(key)) is not None
    }
    if "head_dim" not in found and {"hidden_size", "num_attention_heads"} <= found.keys():
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if header.architecture == "olmo2" and header.of_architecture("attention.sliding_window") is not None:
        raise GgufError("olmo2 with sliding windows (OLMo 3) is not read from GGUF")
    positions = rope_parameters(header) or {"rope_type": "default", "rope_theta": _base(header)}
    if own.rotates_a_part and (size := header.of_architecture("rope.dimension_count")) is not None:
        positions["partial_rotary_factor"] = size / found["head_dim"]
    if header.architecture == "mistral3":
        positions["llama_4_scaling_beta"] = header.of_architecture("attention.temperature_scale") or 0.0
    return {
        **found,
        **{name: tensor in header.tensors for name, tensor in own.of_tensors.items()},
        "rope_parameters": positions,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def special_tokens(header: GgufFile) -> dict[str, int | None]:
    """As a configuration names them. What the file does not say is not so, whatever its type has by default."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()
    }


def rope_parameters(header: GgufFile) -> dict[str, Any] | None:
    """Of positions that are scaled; None: they are not, or in a way that the architecture's own reader knows.
    Raises `GgufError` for scalings that are not read."""
    kind = header.of_architecture("rope.scaling.type") or "none"
    factor = header.of_architecture("rope.scaling.factor") or 1.0
    if kind == "longrope" or kind == "none" or factor == 1.0:
        return None
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": _base(header), "factor": factor}
    if kind == "linear":
        return found
    if kind != "yarn":
        raise GgufError(f"{header.path}: its positions are scaled by {kind!r}, which is not read from GGUF")
    original = header.of_architecture("rope.scaling.original_context_length")
    if original is not None:
        found["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        if (value := header.of_architecture(f"rope.scaling.yarn_{name}")) is not None:
            found[name] = value
    if (scale := header.of_architecture("rope.scaling.yarn_log_multiplier")) is not None:
        found["mscale"] = found["mscale_all_dim"] = scale
    return found


def scale_positions(config: Any, header: GgufFile) -> None:
    """Give a decoder's configuration the scaling of positions that a file has. Raises `GgufError`."""
    if (scaled := rope_parameters(header)) is None:
        return
    known = config.rope_parameters
    # Gemma 3 has two kinds of positions, and only those of layers that look at everything are scaled.
    whole = known.get("full_attention")
    config.rope_parameters = (
        {**known, **scaled} if whole is None else {**known, "full_attention": {**whole, **scaled}}
    )


def _base(header: GgufFile) -> float:
    """Where a file has none it is that of the first Llama."""
    base: float = header.of_architecture("rope.freq_base") or 10_000.0
    return base
