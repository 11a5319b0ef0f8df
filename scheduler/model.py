"""Loads a transformers model and lets its attention read the block pool.

Any decoder-only model whose attention goes through transformers' attention interface works unchanged: Carousel
registers its paged attention there and hands each forward pass the packed batch. What each layer's attention
does (heads, sizes, window, soft cap, scale) is not guessed from the config: it is seen in one probe pass, whose
logits are then held against the model's own attention. A model that differs is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.attention.torch_backend import attend_sequence
from scheduler.checkpoint import Checkpoint, GgufCheckpoint, gguf_file
from scheduler.gguf_file import GgufFile
from scheduler.kv_cache import KVCache

logger = logging.getLogger(__name__)

_ATTENTION = "carousel_paged"

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, LayerSpec], torch.Tensor]
"""(layer, query [T, H, D], key [T, Hkv, D], value [T, Hkv, Dv], what the layer asks for) -> [T, H, Dv]."""


class UnsupportedModelError(ValueError):
    """Carousel cannot serve this model exactly; the message says why."""


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    attend: Attend,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call: [1, heads, T, size] in, [1, T, heads, size] out."""
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError("its attention has sinks, which Carousel does not have yet")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedModelError("it has attention that is not causal")
    spec = LayerSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_dim=query.shape[3],
        value_dim=value.shape[3],
        scaling=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        softcap=softcap,
    )
    layer: int = module.layer_idx  # type: ignore[assignment]
    packed = [states[0].transpose(0, 1) for states in (query, key, value)]
    output = attend(layer, packed[0], packed[1], packed[2], spec)
    return output.unsqueeze(0), None


AttentionInterface.register(_ATTENTION, _attention_forward)


class PagedModel:
    """A causal language model that runs on packed batches, with its KV in the block pool.

    Raises `UnsupportedModelError` if it cannot be served exactly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = model
        self.config: PretrainedConfig = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        self.vocab_size: int = self.config.vocab_size
        self.layers = _probe(model, self.config)

    @property
    def max_len(self) -> int:
        """The longest sequence the model knows positions for, in tokens."""
        config = self.config
        longest: int = getattr(config, "max_position_embeddings", None) or 1 << 20
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

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer, as the model's generation config has them."""
        generation = self.module.generation_config
        ids = generation.eos_token_id if generation is not None else None
        if ids is None:
            ids = self.config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """One step: write the batch's KV, and return the logits of its sample rows,
        [number of sampled sequences, vocabulary]."""

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec
        ) -> torch.Tensor:
            return cache.backend.attend(query, key, value, cache.layers[layer], batch, spec)

        output = self.module(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.sample_rows,
            attend=attend,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def load_model(path: str, device: torch.device) -> PagedModel:
    """Load a model from a folder or a Hugging Face id, in the type its weights are stored in; those of a GGUF file
    as float32. Raises `UnsupportedModelError`, or transformers' OSError if nothing can be loaded from there."""
    model_config = AutoConfig.from_pretrained(path)
    _refuse_by_config(model_config)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it takes a blink
    gguf = gguf_file(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            gguf_file=None if gguf is None else gguf.name,
            dtype="auto" if gguf is None else torch.float32,
            attn_implementation=_ATTENTION,
        )
        if gguf is not None:
            apply_rope_factors(model, GgufCheckpoint(GgufFile(gguf)))
    except ValueError as error:  # transformers' word for: not a causal language model, or no such attention
        raise UnsupportedModelError(str(error)) from error
    model.to(device)  # type: ignore[arg-type]
    return PagedModel(model.eval())  # type: ignore[no-untyped-call]


def apply_rope_factors(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Slow the rotary embedding's frequencies down as a GGUF file says: transformers does not look for that."""
    factors = checkpoint.rope_factors if isinstance(checkpoint, GgufCheckpoint) else None
    if factors is None:
        return
    frequencies = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    if frequencies is None or frequencies.shape != factors.shape:
        raise UnsupportedModelError(
            "its GGUF file has factors for a rotary embedding that the model does not have"
        )
    frequencies.div_(factors.to(frequencies.device))


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("--device cuda: torch sees no CUDA device here")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        features = torch.cpu.get_capabilities()
        fast = device.type == "cuda" or features.get("avx512_bf16") or features.get("amx_bf16")
        name = "bfloat16" if fast else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _refuse_by_config(config: PretrainedConfig) -> None:
    """Refuse early, and in plain words, what the probe would only find as a difference."""
    if config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder model: Carousel has no cross-attention")
    text = config.get_text_config(decoder=True)
    if getattr(text, "add_cross_attention", False):
        raise UnsupportedModelError("it has cross-attention")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(
            f"it has {', '.join(sorted(kinds))} layers: Carousel serves full and sliding-window attention, "
            "whose state is a KV cache and nothing else"
        )


@torch.inference_mode()
def _probe(model: PreTrainedModel, config: PretrainedConfig) -> list[LayerSpec]:
    """Run a few tokens, note what each layer's attention asks for, and compare with the model's own attention."""
    specs: dict[int, LayerSpec] = {}

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec
    ) -> torch.Tensor:
        if specs.setdefault(layer, spec) != spec:
            raise UnsupportedModelError(f"layer {layer} runs two different attentions")
        return attend_sequence(query, key, value, spec)

    ids = torch.arange(1, 9, device=model.device).remainder(config.vocab_size).unsqueeze(0)
    positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    try:
        ours = model(**inputs, logits_to_keep=positions[0], attend=attend).logits.float()
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not pass its batch through transformers' attention interface ({error})"
        ) from error
    if len(specs) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{len(specs)} of the {config.num_hidden_layers} layers of {type(model).__name__} go through "
            "transformers' attention interface: the others keep state that Carousel does not have (state-space or "
            "recurrent layers), or attend in a way of their own"
        )
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if (kind == "sliding_attention") != (specs[layer].sliding_window is not None):
            raise UnsupportedModelError(
                f"layer {layer} is of type {kind}, but its attention is called with a window of "
                f"{specs[layer].sliding_window}"
            )
    model.set_attn_implementation("eager")
    theirs = model(**inputs).logits.float()
    model.set_attn_implementation(_ATTENTION)
    # Rounding differs between two ways to compute the same; a wrong attention differs by far more.
    tolerance = torch.finfo(model.dtype).eps ** 0.5 * max(1.0, theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"paged attention does not give the logits of {type(model).__name__}'s own attention: they differ by "
            f"{difference:.3g} where at most {tolerance:.3g} is rounding"
        )
    return [specs[layer] for layer in range(len(specs))]
