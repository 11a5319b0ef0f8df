"""What transformers' attention modules call instead of their own attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from scheduler.attention import LayerSpec
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.modules.latent_attention import latent_of

ATTENTION = "carousel_paged"
"""Its name there."""


class Asked(NamedTuple):
    """What one layer's attention is to compute."""

    query: torch.Tensor
    """[T, H, D]."""
    key: torch.Tensor
    """[T, Hkv, D]."""
    value: torch.Tensor
    """[T, Hkv, Dv]."""
    spec: LayerSpec
    sinks: torch.Tensor | None
    """[H], if it has them."""
    slopes: torch.Tensor | None
    """[H] float32, if scores fall with the distance."""


Attend = Callable[[int, Asked], torch.Tensor]
"""(layer, what it asks for) -> [T, H, Dv]."""


_ATTEND: ContextVar[Attend] = ContextVar("attend")
"""Not an argument of the forward pass: some models do not hand these on."""


@contextlib.contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """What attention is asked for in here, `attend` computes."""
    token = _ATTEND.set(attend)
    try:
        yield
    finally:
        _ATTEND.reset(token)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call: [1, heads, T, size] in, [1, T, heads, size] out."""
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedModelError("it has attention that is not causal")
    sinks: torch.Tensor | None = kwargs.get("s_aux")
    slopes: torch.Tensor | None = kwargs.get("slopes")
    latent = latent_of(module)
    scaling = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    layer: int = module.layer_idx  # type: ignore[assignment]
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if latent is not None:
        queries = latent.queries(queries)
    chunk = _chunk(module, layer)
    spec = LayerSpec(
        num_heads=queries.shape[1],
        num_kv_heads=keys.shape[1],
        key_dim=queries.shape[2],
        value_dim=values.shape[2],
        scaling=scaling,
        sliding_window=chunk or sliding_window,  # a chunk is a window too, for the pool
        softcap=softcap,
        chunk=chunk,
        has_sinks=sinks is not None,
        has_slopes=slopes is not None,
        values_are_keys=latent is not None,
    )
    output = _ATTEND.get()(layer, Asked(queries, keys, values, spec, sinks, slopes))
    return (output if latent is None else latent.outputs(output)).unsqueeze(0), None


def _chunk(module: nn.Module, layer: int) -> int | None:
    """In tokens, of a layer that attends in chunks: only the mask tells of it, which is not made here."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    is_chunked = layer < len(kinds) and kinds[layer] == "chunked_attention"
    return config.attention_chunk_size if is_chunked else None  # type: ignore[union-attr]


AttentionInterface.register(ATTENTION, attention_forward)
