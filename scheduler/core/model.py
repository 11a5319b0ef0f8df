"""What a model is to those who run steps."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from scheduler.core.attention import LayerSpec, PackedBatch
from scheduler.core.kv_cache import KVCache


class StepOutput(NamedTuple):
    """What a forward pass leaves, besides keys and values."""

    logits: torch.Tensor
    """[sample rows, vocabulary]."""
    states: torch.Tensor
    """[read rows, hidden size]: what the head would make logits of."""


class StepModel(Protocol):
    """Runs a packed batch."""

    layers: list[LayerSpec]

    def bind(self, cache: KVCache, max_len: int) -> None:
        """The pool's tensors are there, and no sequence will be longer than `max_len` tokens."""

    def forward(self, batch: PackedBatch) -> StepOutput:
        """One step: write the batch's keys and values, and return what its rows give."""
