"""What a model of a fused family is, found out with its modules: its outline, and whether the native decoder gives
what they give."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from scheduler.attention.native_backend import NativeAttention
from scheduler.models.checks.probe import caught, check_packed, small_model, small_paged, truth
from scheduler.models.files.checkpoint import ModuleCheckpoint
from scheduler.models.fused.fused_model import FusedModel
from scheduler.models.fused.fused_weights import pack_weights
from scheduler.models.fused.outline import Outline, Rope, rope_kind
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.modules.attention_interface import ATTENTION
from scheduler.models.modules.paged_model import PagedModel
from scheduler.models.remembered import Facts

logger = logging.getLogger(__name__)

_VOCABULARY = 64


def find(config: PretrainedConfig) -> Facts:
    """The outline, and as `obstacle` why the native decoder cannot run such a model, if it cannot. Raises
    `UnsupportedModelError` where paged attention is not the model's."""
    return {**outline_of(_narrow(config)).as_facts(), "obstacle": _obstacle(config)}


def outline_of(model: PagedModel) -> Outline:
    causal_lm: Any = model.module
    rotary = causal_lm.model.rotary_emb
    ropes = {}
    for kind in dict.fromkeys(rope_kind(model.config, layer) for layer in range(len(model.layers))):
        prefix = "" if kind is None else f"{kind}_"
        frequencies = getattr(rotary, f"{prefix}inv_freq").detach().float().clone()
        ropes[kind] = Rope(frequencies, float(getattr(rotary, f"{prefix}attention_scaling")))
    return Outline(model.layers, list(causal_lm.state_dict()), ropes)


def _narrow(config: PretrainedConfig) -> PagedModel:
    """The model of this config with its layers, heads and positions as they are, but narrow, and with random
    weights: what its attention asks for can be seen without its own."""
    small: Any = copy.deepcopy(config)
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # A whole number for each head, which some configs insist on.
    small.hidden_size = small.intermediate_size = 2 * config.num_attention_heads
    small.vocab_size = _VOCABULARY
    small.pad_token_id = None  # it may be beyond the vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            small, dtype=torch.float32, attn_implementation=ATTENTION
        )
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger than models are made, so that attention makes a difference
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return PagedModel(model.eval())


def _obstacle(config: PretrainedConfig) -> str | None:
    """Seen with a small copy: its own forward pass, without any cache, is the truth."""
    try:
        module = small_model(config)
        expected = truth(module)
        shape = small_paged(config)
    except Exception as error:
        logger.info("there is no small copy of this model to try (%s: %s)", type(error).__name__, error)
        return None

    def fused() -> FusedModel:
        weights = pack_weights(shape.config, ModuleCheckpoint(shape.module), "f32", "f32")
        return FusedModel(shape.config, outline_of(shape), weights, num_threads=1)

    try:
        check_packed(caught(fused), module, NativeAttention(1), expected, "the native decoder")
    except UnsupportedModelError as error:
        return str(error)
    return None
