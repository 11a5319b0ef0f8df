"""Positions that are others in a long text: LongRoPE (Ding et al., arXiv 2402.13753), as Phi-3 and later have it.

Beyond the length that a model was trained for first, each frequency of its rotary embedding is divided by another
factor, for all of the text. transformers decides that for a whole batch by the longest text in it; here it is said
of each row, so a request's bits do not depend on who else is in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scheduler.attention import PackedBatch

NAME = "rotary_emb"


class LongPositions(nn.Module):
    """Stands in for a model's rotary embedding, and is that itself where `rows` is None."""

    def __init__(self, own: Any, long_after: int) -> None:
        super().__init__()
        self.own = own
        self.long_after = long_after
        """Tokens of the longest text that is not long."""
        self.rows: Tensor | None = None
        """[T] bool: which rows of the batch are of long texts."""
        device = own.inv_freq.device
        short, long = (self._frequencies(own, device, length) for length in (long_after, long_after + 1))
        self.register_buffer("short", short, persistent=False)
        self.register_buffer("long_", long, persistent=False)

    @contextlib.contextmanager
    def step(self, batch: PackedBatch) -> Iterator[None]:
        """Within it, the rows are those of this batch."""
        are_long = batch.long_rows
        self.rows = torch.zeros_like(batch.positions, dtype=torch.bool) if are_long is None else are_long
        try:
            yield
        finally:
            self.rows = None

    @staticmethod
    def _frequencies(own: Any, device: torch.device, length: int) -> Tensor:
        own(torch.empty(0, device=device), torch.arange(length, device=device)[None])
        frequencies: Tensor = own.inv_freq.detach().clone()
        return frequencies

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [1, T, rotary_dim] of the type of `x`."""
        if self.rows is None:
            cos, sin = self.own(x, position_ids)
            return cos, sin
        frequencies = torch.where(self.rows[:, None], self.get_buffer("long_"), self.get_buffer("short"))
        angles = position_ids[0].float()[:, None] * frequencies.float()
        both_halves = torch.cat((angles, angles), dim=1)[None]
        scaling: float = self.own.attention_scaling
        return (both_halves.cos() * scaling).to(x.dtype), (both_halves.sin() * scaling).to(x.dtype)


def positions_of(model: PreTrainedModel) -> LongPositions | None:
    found = getattr(model.base_model, NAME, None)
    return found if isinstance(found, LongPositions) else None


@torch.inference_mode()
def take_over(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Put it into a model whose positions change with the length of the text, where it gives what the model's own
    gives on both sides of that length."""
    rope = getattr(config, "rope_parameters", None) or {}
    own: Any = getattr(model.base_model, NAME, None)
    if rope.get("rope_type") != "longrope" or getattr(own, "rope_type", None) != "longrope":
        return
    long_after = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    found = LongPositions(own, long_after)
    for length in (long_after, long_after + 1):
        positions = torch.arange(length, device=own.inv_freq.device)[None]
        x = torch.empty(0, device=positions.device)
        theirs = own(x, positions)
        found.rows = torch.full((length,), length > long_after, device=positions.device)
        if not all(torch.equal(ours, each) for ours, each in zip(found(x, positions), theirs, strict=True)):
            return
    found.rows = None
    setattr(model.base_model, NAME, found)
