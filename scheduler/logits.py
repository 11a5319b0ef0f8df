"""What sampling asks of whole rows of logits, each in as few passes over the vocabulary as it takes.

In torch for every device, and natively for a CPU, where the vocabulary is what sampling costs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from scheduler.native import kernels


class LogitScans(Protocol):
    """All take float32 logits, [rows, vocabulary]. A row's result does not depend on the other rows."""

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row, NaN if one of them is, and its token: each [rows]."""

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
        """Where `numbers` (float64, 0 to 1) fall in the cumulative distribution of softmax(logits / temperatures):
        token ids, [rows]."""

    def log_total(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        """The logarithm of the sum of exp(logits / temperatures), [rows]."""

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest logits of each row in falling order, and their tokens: each [rows, count]."""


class TorchScans:
    """In plain torch."""

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, tokens = logits.max(dim=-1)
        return values, tokens

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
        return invert(torch.softmax(logits / temperatures.unsqueeze(1), dim=-1), numbers)

    def log_total(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        return (logits / temperatures.unsqueeze(1)).logsumexp(dim=-1)

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, tokens = logits.topk(count, dim=-1)
        return values, tokens


class NativeScans:
    """In C++ (kernels/sampler.cpp), rows in parallel."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._kernels = kernels()

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, tokens = self._kernels.argmax(logits, num_threads=self._num_threads)
        return values, tokens

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
        tokens: Tensor = self._kernels.draw(logits, temperatures, numbers, num_threads=self._num_threads)
        return tokens

    def log_total(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        total: Tensor = self._kernels.logsumexp(logits, temperatures, num_threads=self._num_threads)
        return total

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, tokens = self._kernels.top_candidates(logits, count, num_threads=self._num_threads)
        return values, tokens


def invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row: the first place where it exceeds number * total."""
    cumulative = weights.double().cumsum(dim=-1)
    thresholds = numbers.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)
