"""A checkpoint read once more, in another way: what files/ reads is held against it.

It shares no code and no table with files/: the packages safetensors and gguf read the numbers, and what a format
stores is worked out from the names, shapes and settings of the file alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scheduler.models.checks.second_dequantizer import dequantized
from scheduler.models.checks.second_gguf import read_floats, read_header
from scheduler.models.files.checkpoint import CheckpointError


class SecondReader(Protocol):
    """All weights of a checkpoint, by the names that its decoder's modules have in transformers."""

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the decoder's configuration, where the weights' file has them too."""

    @property
    def rope_factors(self) -> Tensor | None:
        """What each frequency of the rotary embedding is divided by, where the file says so."""

    def floats(self, name: str, rows: list[int] | None = None) -> Tensor:
        """One weight in float32, or some of its rows. Raises `CheckpointError`."""


def second_reader(folder: str, quantization: Mapping[str, Any] | None) -> SecondReader:
    """Of what a model's folder has. Raises `CheckpointError`."""
    path = Path(folder)
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.exists():
        files = [path / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    elif (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    if files:
        return _Safetensors(files, quantization or {})
    found = sorted(path.glob("*.gguf"))
    if not found:
        raise CheckpointError(f"{folder} has no weights that can be read a second time")
    return _Gguf(sorted(path.glob("*-of-*.gguf")) or found[:1])


# GGUF ---------------------------------------------------------------------------------------------------

_OF_GGUF = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}

_OF_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Which norms both of a layer's parts, before and after."""

_OTHER_NORMS = {
    **dict.fromkeys(("gemma2", "gemma3"), _OF_GEMMA),
    "olmo2": {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "glm4": {
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
        "ffn_up": "mlp.gate_up_proj",
    },
}
"""By architecture, what is called otherwise there."""

_AS_LLAMA = ("llama", "granite", "mistral3", "smollm3")
"""Whose converters order the rows of heads as the authors of Llama did."""

ROPE_FACTORS = "rope_freqs.weight"

_SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Of a configuration, and what they are called in a file after the name of its architecture."""


class _Gguf:
    def __init__(self, files: list[Path]) -> None:
        header, *others = map(read_header, files)
        self._tensors = dict(header.tensors)
        for other in others:
            self._tensors |= other.tensors
        architecture = header.values["general.architecture"]
        self._is_gemma = architecture.startswith("gemma")
        self._known = _OF_GGUF | _OTHER_NORMS.get(architecture, {})
        own = {key.removeprefix(f"{architecture}."): value for key, value in header.values.items()}
        heads = (
            own.get("attention.head_count"),
            own.get("attention.head_count_kv", own.get("attention.head_count")),
        )
        self._pairs = dict(zip("qk", heads, strict=True)) if architecture in _AS_LLAMA else {}
        """Heads of which the halves are interleaved: the file has them as the authors of Llama did."""
        self._stored = {self._module_name(name): name for name in self._tensors if name != ROPE_FACTORS}
        self.names = frozenset(self._stored)
        self.settings = _settings(own, architecture, self.names)
        self.rope_factors = None
        if ROPE_FACTORS in self._tensors:
            self.rope_factors = read_floats(self._tensors[ROPE_FACTORS]).flatten()

    def floats(self, name: str, rows: list[int] | None = None) -> Tensor:
        place = self._tensors[self._stored[name]]
        try:
            values = read_floats(place, rows)
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"{name} is of a type of GGUF ({error}) that is not read a second time"
            ) from error
        if self._is_gemma and "norm" in name:
            values -= 1
        part = re.search(r"\.([qk])_proj\.", name)
        if part and (heads := self._pairs.get(part[1])):
            size = len(values) // heads
            order = [head * size + at for head in range(heads) for at in (*range(0, size, 2), *range(1, size, 2))]
            values = values[order]
        return values

    def _module_name(self, name: str) -> str:
        stem, _, end = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        known = self._known
        if stem == "output":
            return f"lm_head.{end}"
        if layer and layer[2] in known:
            return f"model.layers.{layer[1]}.{known[layer[2]]}.{end}"
        return f"model.{known[stem]}.{end}" if stem in known else name


def _settings(own: Mapping[str, Any], architecture: str, names: frozenset[str]) -> dict[str, Any]:
    found = {name: own[key] for name, key in _SETTINGS.items() if own.get(key) is not None}
    found["tie_word_embeddings"] = "lm_head.weight" not in names
    base = own.get("rope.freq_base")
    if base is not None and architecture != "gemma3":  # which has two
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": base} | _scaling(own)
    if architecture == "llama":
        for part, name in (("attention", "self_attn.q_proj"), ("mlp", "mlp.up_proj")):
            found[f"{part}_bias"] = f"model.layers.0.{name}.bias" in names
    return found


def _scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    """Of positions; none where they are as they were trained."""
    scaling = {key.removeprefix("rope.scaling."): own[key] for key in own if key.startswith("rope.scaling.")}
    if scaling.get("type") not in ("linear", "yarn") or scaling.get("factor", 1.0) == 1.0:
        return {}
    found = {"rope_type": scaling["type"], "factor": scaling["factor"]}
    renamed = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "yarn_log_multiplier": "mscale",
    }
    if scaling["type"] == "yarn":
        found |= {name: scaling[key] for key, name in renamed.items() if key in scaling}
    return found | ({"mscale_all_dim": found["mscale"]} if "mscale" in found else {})


# safetensors --------------------------------------------------------------------------------------------

_PART = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.(?P<of_weight>qweight|qzeros|scales|g_idx|SCB|weight_(?:packed|scale|scale_inv|shape|zero_point|g_idx|global_scale)"
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4)))"
    r"|\.(?:weight_format|input_scale|input_scale_ub|input_global_scale|activation_scale|k_scale|v_scale)"
    r"|(?P<of_all>_blocks|_scales))"
)
"""A tensor that is a part of a quantized weight, or of activations, which are not rounded."""


class _Safetensors:
    settings: Mapping[str, Any] = {}
    rope_factors = None

    def __init__(self, files: list[Path], quantization: Mapping[str, Any]) -> None:
        from safetensors import safe_open

        self._open = safe_open
        self._quantization = quantization
        self._parts: dict[str, dict[str, tuple[Path, str]]] = {}
        """Where each part of a weight is."""
        for file in files:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    self._sort_in(name, file)
        self.names = frozenset(self._parts)

    def _sort_in(self, name: str, file: Path) -> None:
        alone = _decoder_name(name)
        if alone is None:
            return
        weight, part = alone, "weight"
        if self._quantization and (found := _PART.fullmatch(alone)) is not None:
            if found["of_weight"]:
                weight, part = f"{found['stem']}.weight", found["of_weight"]
            elif found["of_all"]:
                weight, part = found["stem"], found["of_all"]
            else:
                return
        self._parts.setdefault(weight, {})[part] = (file, name)

    def floats(self, name: str, rows: list[int] | None = None) -> Tensor:
        places = self._parts[name]
        if set(places) == {"weight"} and rows is not None:
            file, stored_name = places["weight"]
            with self._open(file, framework="pt") as stored:
                matrix = stored.get_slice(stored_name)
                return torch.cat([matrix[row : row + 1] for row in rows]).float()
        parts = {part: self._tensor(*place) for part, place in places.items()}
        values = (
            parts["weight"].float() if set(parts) == {"weight"} else dequantized(name, parts, self._quantization)
        )
        return values if rows is None else values[rows]

    def _tensor(self, file: Path, name: str) -> Tensor:
        with self._open(file, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor


def _decoder_name(name: str) -> str | None:
    """What a weight is called in a checkpoint of the decoder alone; None: it is of a part for images or sound."""
    if name.startswith(("embed_tokens.", "layers.", "norm.")):
        return f"model.{name}"
    if "language_model." not in name:
        return (
            name if not re.match(r"(model\.)?(vision|audio|multi_modal|mm_|visual|embed_vision)", name) else None
        )
    inner = name.split("language_model.", 1)[1]
    return inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"


# What ends an answer -------------------------------------------------------------------------------------


def second_ends(folder: str) -> frozenset[int]:
    """The tokens that end an answer, as a model's files name them."""
    path = Path(folder)
    config = _json(path / "config.json")
    ends = _json(path / "generation_config.json").get("eos_token_id")
    if ends is None:
        ends = config.get("text_config", config).get("eos_token_id", config.get("eos_token_id"))
    found = {ends} if isinstance(ends, int) else set(ends or ())
    name = _json(path / "tokenizer_config.json").get("eos_token")
    if name and (path / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        text = name if isinstance(name, str) else name["content"]
        found.add(Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(text))
    for file in sorted(path.glob("*.gguf"))[:1] if not any(path.glob("*.safetensors")) else ():
        values = read_header(file).values
        found |= {values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    return frozenset(found - {None})


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes()) if file.exists() else {}
