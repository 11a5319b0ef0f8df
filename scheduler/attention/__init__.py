"""Paged attention: one interface (interface.py), one file a backend."""

from __future__ import annotations

import torch

from scheduler.attention.interface import AttentionBackend, LayerSpec, PackedBatch
from scheduler.attention.torch_backend import TorchAttention

__all__ = ["AttentionBackend", "LayerSpec", "PackedBatch", "choose_backend"]


def choose_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend called `name`; `auto` is the fastest one that works on `device`."""
    return TorchAttention()
