"""Paged attention: one interface (core/attention.py), one file a backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from scheduler.attention.flex_backend import FlexAttention
from scheduler.attention.modules_attention import ModulesAttention
from scheduler.attention.native_backend import NativeAttention
from scheduler.core.attention import AttentionBackend, LayerCache, LayerSpec, PackedBatch, TorchAttention
from scheduler.kernels.native import NativeBuildError

__all__ = ["AttentionBackend", "BackendError", "LayerCache", "LayerSpec", "PackedBatch", "choose_backend"]

logger = logging.getLogger(__name__)


class BackendError(ValueError):
    """The attention backend that was asked for cannot serve this model here; the message says why."""


def choose_backend(
    name: str,
    specs: Sequence[LayerSpec],
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> AttentionBackend:
    """The backend called `name`; `auto` is the fastest one that can serve these layers, the model itself where it
    has none.

    Raises `BackendError` for a backend asked for by name that cannot.
    """
    if not specs:
        return ModulesAttention()
    if name == "torch":
        return TorchAttention()
    if name == "flex" or (name == "auto" and device.type == "cuda"):
        reason = FlexAttention.obstacle(specs, block_size, device)
        if reason is None:
            return FlexAttention(device)
    else:
        reason = NativeAttention.obstacle(specs, block_size, dtype, device)
        if reason is None:
            try:
                return NativeAttention(num_threads)
            except NativeBuildError as error:
                reason = str(error)
    if name != "auto":
        raise BackendError(f"--attention-backend {name}: {reason}")
    logger.warning("attention falls back to plain torch, which is many times slower: %s", reason)
    return TorchAttention()
