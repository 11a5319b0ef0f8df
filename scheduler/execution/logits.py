"""What sampling asks of whole rows of logits, each in as few passes over the vocabulary as it takes.

In torch for every device, and natively for a CPU, where the vocabulary is what sampling costs.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.core.drawing import Truncation, invert, narrowed
from scheduler.execution.steering import Steered
from scheduler.kernels.native import kernels

NUM_CANDIDATES = 256
"""In torch, truncation first looks at this many likeliest tokens, and sorts the whole vocabulary only for a row
where they are not enough."""


class LogitScans(Protocol):
    """All take float32 logits, [rows, vocabulary]. A row's result does not depend on the other rows."""

    def steer(self, logits: Tensor, steered: Steered) -> None:
        """Change some rows, in place."""

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row, NaN if one of them is, and its token: each [rows]."""

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
        """Where `numbers` (float64, 0 to 1) fall in the cumulative distribution of softmax(logits / temperatures):
        token ids, [rows]."""

    def draw_truncated(
        self, logits: Tensor, temperatures: Tensor, numbers: Tensor, truncation: Truncation
    ) -> Tensor:
        """The same among the tokens that are left when the choice is narrowed: token ids, [rows]."""

    def log_total(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        """The logarithm of the sum of exp(logits / temperatures), [rows]."""

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest logits of each row in falling order, and their tokens: each [rows, count]."""


class TorchScans:
    """In plain torch."""

    def steer(self, logits: Tensor, steered: Steered) -> None:
        def tensor(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(logits.device)

        rows, vocabulary = tensor(steered.rows), logits.shape[1]

        def rows_of(starts: npt.NDArray[np.int64]) -> Tensor:
            return torch.repeat_interleave(rows, tensor(np.diff(starts)))

        at = rows_of(steered.seen_starts), tensor(steered.seen)
        each = np.repeat(steered.penalties, np.diff(steered.seen_starts), axis=0)
        repetition, frequency, presence = tensor(each).unbind(1)
        times, found = tensor(steered.times), logits[at]
        found = torch.where(found > 0, found / repetition, found * repetition)
        logits[at] = found - frequency * times - presence * (times > 0)
        at = rows_of(steered.bias_starts), tensor(steered.biased)
        logits.index_put_(at, tensor(steered.biases), accumulate=True)
        if len(steered.allowed):
            bits = np.unpackbits(steered.allowed.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
            masked = tensor(steered.rows[steered.masks >= 0])
            logits[masked] = logits[masked].masked_fill(~tensor(bits).bool(), -torch.inf)

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, tokens = logits.max(dim=-1)
        return values, tokens

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
        return invert(torch.softmax(logits / temperatures.unsqueeze(1), dim=-1), numbers)

    def draw_truncated(
        self, logits: Tensor, temperatures: Tensor, numbers: Tensor, truncation: Truncation
    ) -> Tensor:
        vocabulary = logits.shape[1]
        log_total = self.log_total(logits, temperatures)

        def draw(rows: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
            values, ids = self.top(logits[rows], num_candidates)
            scaled = values / temperatures[rows].unsqueeze(1)
            narrowed = Truncation(*(each[rows] for each in truncation))
            return _draw_from_likeliest(scaled, ids, log_total[rows], numbers[rows], narrowed, vocabulary)

        tokens, enough = draw(torch.arange(len(logits), device=logits.device), min(NUM_CANDIDATES, vocabulary))
        missing = torch.nonzero(~enough).squeeze(1)
        if len(missing) > 0:
            tokens[missing], _ = draw(missing, vocabulary)
        return tokens

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

    def steer(self, logits: Tensor, steered: Steered) -> None:
        parts = (*steered[:-1], steered.allowed.view(np.int32))
        self._kernels.steer(logits, *map(torch.from_numpy, parts), num_threads=self._num_threads)

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, tokens = self._kernels.argmax(logits, num_threads=self._num_threads)
        return values, tokens

    def draw(self, logits: Tensor, temperatures: Tensor, numbers: Tensor) -> Tensor:
        tokens: Tensor = self._kernels.draw(logits, temperatures, numbers, num_threads=self._num_threads)
        return tokens

    def draw_truncated(
        self, logits: Tensor, temperatures: Tensor, numbers: Tensor, truncation: Truncation
    ) -> Tensor:
        tokens: Tensor = self._kernels.draw_truncated(
            logits, temperatures, numbers, *truncation, num_threads=self._num_threads
        )
        return tokens

    def log_total(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        total: Tensor = self._kernels.logsumexp(logits, temperatures, num_threads=self._num_threads)
        return total

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, tokens = self._kernels.top_candidates(logits, count, num_threads=self._num_threads)
        return values, tokens


def are_all(weights: Tensor, truncation: Truncation, vocabulary: int) -> Tensor:
    """For which rows of `narrowed` there is nothing to choose from beyond these candidates: [rows] bool."""
    candidates = weights.shape[1]
    within_top_k = (truncation.top_k > 0) & (truncation.top_k <= candidates)
    return (weights[:, -1] == 0) | (candidates == vocabulary) | within_top_k


def _draw_from_likeliest(
    scaled: Tensor, ids: Tensor, log_total: Tensor, numbers: Tensor, truncation: Truncation, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Draw from each row's likeliest tokens `ids`, whose logits over temperature are `scaled`, in falling order;
    the second result says for which rows the truncation lay within them, so that the draw is the right one."""
    weights = narrowed(scaled, log_total, truncation, vocabulary)
    places = invert(weights, numbers)
    return ids.gather(1, places.unsqueeze(1)).squeeze(1), are_all(weights, truncation, vocabulary)
