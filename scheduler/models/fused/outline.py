"""A small random copy of a model: what its attention asks for can be seen without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from scheduler.models.modules.attention_interface import ATTENTION
from scheduler.models.modules.paged_model import PagedModel

_VOCABULARY = 64


def head_dim(config: PretrainedConfig) -> int:
    """Size of one head of attention, which some configs leave to be computed."""
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def outline(config: PretrainedConfig) -> PagedModel:
    """The model of this config with its layers and heads as they are, but narrow, and with random weights.

    It passes the same probe as the model itself, which compares paged attention with the model's own; and its
    rotary embedding is the model's. Raises `UnsupportedModelError`.
    """
    small: Any = copy.deepcopy(config)
    small.head_dim = head_dim(config)
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
