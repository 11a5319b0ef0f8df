"""What the native decoder has to know of a model beside its weights: what its layers attend to, what its weights
are called, and how its positions turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from scheduler.attention import LayerSpec
from scheduler.models.files.checkpoint import OTHER_FACTORS, CheckpointError

RopeTables = dict[str | None, tuple[Tensor, Tensor]]
"""By kind of rotary embedding: cosines and sines, each [positions, rotary_dim] float32."""


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding: the angle of a position is the position times each frequency."""

    frequencies: Tensor
    """[rotary_dim / 2] float32, in radians."""
    scaling: float
    """Of cosines and sines."""

    def table(self, positions: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(positions).float()[:, None] * self.frequencies
        both_halves = torch.cat((angles, angles), dim=1)
        return both_halves.cos() * self.scaling, both_halves.sin() * self.scaling


@dataclass(frozen=True, slots=True)
class Outline:
    """`ropes` by kind, None where there is one for all layers; `weights` are names, as the model has them."""

    layers: list[LayerSpec]
    weights: list[str]
    ropes: dict[str | None, Rope]

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Outline:
        return cls(
            [LayerSpec(**layer) for layer in facts["layers"]],
            facts["weights"],
            {
                kind: Rope(torch.tensor(frequencies, dtype=torch.float32), scaling)
                for kind, frequencies, scaling in facts["ropes"]
            },
        )

    def as_facts(self) -> dict[str, Any]:
        """As JSON has them: a float32 is the same number there."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "weights": self.weights,
            "ropes": [(kind, rope.frequencies.tolist(), rope.scaling) for kind, rope in self.ropes.items()],
        }

    def slowed(self, factors: Tensor | None) -> Outline:
        """With frequencies divided by `factors`. Raises `CheckpointError` where they are not for this model."""
        if factors is None:
            return self
        rope = self.ropes.get(None)
        if rope is None or rope.frequencies.shape != factors.shape:
            raise CheckpointError(OTHER_FACTORS)
        return replace(self, ropes={None: replace(rope, frequencies=rope.frequencies / factors)})

    def tables(self, positions: int) -> RopeTables:
        return {kind: rope.table(positions) for kind, rope in self.ropes.items()}


def rope_kind(config: PretrainedConfig, layer: int) -> str | None:
    """Which of the model's rotary embeddings a layer uses, where there is a choice."""
    return str(config.layer_types[layer]) if config.model_type == "gemma3_text" else None
