"""Products of rows with one of several weights each: of experts, or of attention heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scheduler.kernels.library import GroupedProduct
from scheduler.kernels.native import kernels
from scheduler.models.products import Mode


class GroupedLinear:
    """Products of rows [S, in_features], sorted by group, with weights [out_features, in_features] of each group.

    A row of a product has the same bits whatever rows surround it.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, mode: Mode, num_threads: int
    ) -> None:
        pack = kernels().pack
        packed = [
            pack([weight.detach().contiguous()], None if biases is None else biases[group].detach().float(), mode)
            for group, weight in enumerate(weights)
        ]
        self._product = GroupedProduct(packed)
        self._num_threads = num_threads
        self.nbytes: int = self._product.nbytes

    def __call__(self, rows: Tensor, starts: list[int]) -> Tensor:
        """Rows [starts[g], starts[g + 1]) are those of group g; returns [S, out_features]."""
        product: Tensor = self._product(rows.contiguous(), starts, num_threads=self._num_threads)
        return product
