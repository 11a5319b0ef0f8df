"""What is known of a model before its weights are read."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    GenerationConfig,
    PretrainedConfig,
)

from scheduler.models.files.checkpoint import (
    BASE_EMBEDDING,
    HEAD,
    SafetensorsCheckpoint,
    gguf_file,
    open_checkpoint,
)
from scheduler.models.files.embedding_layout import EmbeddingLayout, embedding_layout
from scheduler.models.files.end_tokens import VERSION as ENDS_VERSION
from scheduler.models.files.end_tokens import tokenizers_end
from scheduler.models.remembered import model_version, remembered
from scheduler.sampling_params import MODEL_DEFAULTS


class UnsupportedModelError(ValueError):
    """Carousel cannot serve this model exactly; the message says why."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's config, and the tokens that end an answer, as its generation config has them."""

    whole: PretrainedConfig
    eos_token_ids: frozenset[int]
    sampling_defaults: dict[str, float]
    """What the generation config says of how to choose tokens."""
    quantization: dict[str, Any] | None
    """How its weights are quantized, where they are. The configuration itself says nothing of it: they are made
    floats."""
    embeddings: EmbeddingLayout
    has_head: bool = True
    """Whether its checkpoint has logits; a model for embeddings may have been saved without them."""

    @property
    def text(self) -> PretrainedConfig:
        """The part of it that is about the decoder."""
        config: PretrainedConfig = self.whole.get_text_config(decoder=True)
        return config

    @property
    def vocab_size(self) -> int:
        size: int = self.text.vocab_size
        return size

    @property
    def full_len(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return getattr(self.text, "max_position_embeddings", None) or 1 << 20

    @property
    def max_len(self) -> int:
        """The longest sequence whose positions are the same whatever its length is, in tokens."""
        config = self.text
        longest = self.full_len
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = rope.values() if all(isinstance(part, dict) for part in rope.values()) else [rope]
        for kind in kinds:
            # These change every position's rotation once any sequence in the batch is longer than the original
            # length: beyond it, a sequence's result would depend on who else is in the batch.
            if kind.get("rope_type") in ("dynamic", "longrope"):
                original = kind.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", None
                )
                longest = min(longest, original or longest)
        return longest


def auto_class(config: PretrainedConfig) -> Any:
    """What of transformers makes a model of this configuration that gives logits of text."""
    of_images = type(config) in AutoModelForImageTextToText._model_mapping
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if of_images and not is_causal else AutoModelForCausalLM


def read_config(path: str) -> ModelConfig:
    """Of a folder or a Hugging Face id. Raises `UnsupportedModelError`, or transformers' OSError if there is
    none."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except StrictDataclassError as error:  # a value of a wrong type
        said = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"its config cannot be read: {said}") from error
    except ValueError as error:
        raise UnsupportedModelError(_why_unknown(path, error)) from error
    _refuse(config)
    text = config.get_text_config(decoder=True)
    if (padding := getattr(text, "pad_token_id", None)) is not None and padding >= text.vocab_size:
        text.pad_token_id = None  # nothing is padded here, and modules refuse one beyond the vocabulary
    quantization = _take_quantization(config)
    defaults: dict[str, float] = {}
    ids = None
    with contextlib.suppress(OSError):
        generation = GenerationConfig.from_pretrained(path)
        ids = generation.eos_token_id
        found = {name: getattr(generation, name, None) for name in MODEL_DEFAULTS}
        defaults = {name: value for name, value in found.items() if isinstance(value, int | float)}
    if ids is None:
        ids = getattr(text, "eos_token_id", None)
    end_tokens = frozenset([ids] if isinstance(ids, int) else ids or [])
    if not all(isinstance(token_id, int) for token_id in end_tokens):
        raise UnsupportedModelError(f"the tokens that end its answers (eos_token_id) are {ids!r}, and no numbers")
    # A vocabulary of megabytes may be read for one number.
    facts = (ENDS_VERSION, path, model_version(path))
    tokenizers = remembered("tokenizers", facts, lambda: {"end": tokenizers_end(Path(path))})
    if tokenizers["end"] is not None:
        end_tokens |= {tokenizers["end"]}
    return ModelConfig(config, end_tokens, defaults, quantization, embedding_layout(Path(path)))


def _why_unknown(path: str, error: ValueError) -> str:
    """Of a type that transformers does not know."""
    try:
        config = json.loads((Path(path) / "config.json").read_bytes())
        name, has_code = config.get("model_type"), "auto_map" in config
    except (OSError, ValueError, AttributeError):
        return f"its config cannot be read: {error}"
    if has_code:
        return (
            f"its type {name!r} needs code from its folder (auto_map), and code from a model's folder is never run"
        )
    return f"transformers {transformers.__version__} does not know its type {name!r}"


def with_what_is_stored(path: str, config: ModelConfig) -> ModelConfig:
    """The same, of a checkpoint that may have no head. Raises what `open_checkpoint` does."""
    if getattr(config.text, "tie_word_embeddings", False) or gguf_file(path) is not None:
        return config
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        return config
    if BASE_EMBEDDING not in checkpoint.names or HEAD in checkpoint.names:
        return config
    config.text.tie_word_embeddings = True  # nobody looks at what stands in for it
    return replace(config, has_head=False)


def _take_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            del part.quantization_config
            return dict(found) if isinstance(found, dict) else dict(found.to_dict())
    return None


def _refuse(config: PretrainedConfig) -> None:
    """Refuse early, and in plain words, what the probe would only find as a difference."""
    if config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder model: Carousel has no cross-attention")
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_decoder", None) is False and type(config) in AutoModelForMaskedLM._model_mapping:
        raise UnsupportedModelError(
            f"it is an encoder ({config.model_type}), which has no next token to give (is_decoder is false)"
        )
    if getattr(text, "add_cross_attention", False):
        raise UnsupportedModelError("it has cross-attention")
