"""The KV tensors behind the block ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from scheduler.core.attention import AttentionBackend, LayerCache, LayerSpec


class LayerGroup(NamedTuple):
    """Layers that share block tables."""

    window: int | None
    """How many keys a query sees, its own among them; None: all."""
    layers: list[int]


def largest(groups: Sequence[LayerGroup]) -> list[int]:
    """The layers of the largest group: a block has room for these."""
    return max((group.layers for group in groups), key=len)


def one_group(specs: Sequence[LayerSpec]) -> LayerGroup:
    """All layers, each with tensors of its own: a sequence keeps all its blocks."""
    return LayerGroup(None, list(range(len(specs))))


class KVCache:
    """The key and value tensors behind the block ids, in the layout of the attention backend: a pair for each
    place in a group, which the layers at that place share, each by its group's blocks."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        backend: AttentionBackend,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[LayerGroup] | None = None,
    ) -> None:
        self.specs = list(specs)
        self.backend = backend
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.groups = list(groups) if groups is not None else [one_group(specs)]
        places = largest(self.groups)
        self._tensors = [backend.allocate(specs[layer], num_blocks, block_size, dtype, device) for layer in places]
        layers = {
            layer: LayerCache(*self._tensors[place], number)
            for number, group in enumerate(self.groups)
            for place, layer in enumerate(group.layers)
        }
        self.layers = [layers[layer] for layer in range(len(specs))]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self._tensors for tensor in pair)
