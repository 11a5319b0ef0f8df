"""What every model is to those who run steps."""

from __future__ import annotations

from typing import Protocol

import torch

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.execution.kv_cache import KVCache


class StepModel(Protocol):
    """Runs a packed batch: PagedModel, FusedModel, or CudaGraphs around one of them."""

    layers: list[LayerSpec]

    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """One step: write the batch's keys and values, and return the logits of its sample rows,
        [rows, vocabulary]."""
