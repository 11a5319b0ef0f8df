"""From logits to the next token, for a whole batch at once.

Randomness is counter-based (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the number
that decides a token is a function of the request's seed, the sequence's index and the token's position, and of
nothing else. So a seeded request draws the same tokens whoever else is in the batch and however often it was
preempted, and there is no generator state to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from scheduler.core.sampling import Sampling
from scheduler.core.step import SampledToken


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Whose token is sampled from one row of logits."""

    params: Sampling
    index: int
    """The sequence's place among the request's n."""
    position: int
    """How many tokens the sequence has so far."""

    @property
    def is_truncated(self) -> bool:
        return self.params.top_k > 0 or self.params.top_p < 1.0 or self.params.min_p > 0.0


class Truncation(NamedTuple):
    """How each row's choice is narrowed: top-k, then top-p of what it left, then min-p. Each [rows]."""

    top_k: Tensor
    """int64; 0 keeps all."""
    top_p: Tensor
    """float64."""
    min_p: Tensor
    """float64."""

    @classmethod
    def of(cls, params: Sequence[Sampling], device: torch.device) -> Self:
        kept = zip(*((each.top_k, each.top_p, each.min_p) for each in params), strict=True)
        top_k, top_p, min_p = torch.tensor(list(kept), dtype=torch.float64, device=device)
        return cls(top_k.long(), top_p, min_p)


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | None]:
    """Choose one token for each row of `logits`, [len(rows), vocabulary] in any float type. None for a row whose
    logits are not numbers, or where all are minus infinity."""
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    for is_truncated, draw in ((False, _draw), (True, _draw_truncated)):
        drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy and row.is_truncated is is_truncated]
        if drawn:
            tokens[drawn] = draw(logits[drawn], [rows[i] for i in drawn])
    are_broken = (~torch.isfinite(best)).tolist()
    return [
        None if broken else SampledToken(token) for token, broken in zip(tokens.tolist(), are_broken, strict=True)
    ]


def uniform(rows: Sequence[SamplingRow]) -> np.ndarray:
    """One number in [0, 1) for each row, [len(rows)] float64: splitmix64 (Steele et al., OOPSLA 2014) over
    seed, index and position."""
    state = np.zeros(len(rows), dtype=np.uint64)
    for part in (
        [row.params.seed or 0 for row in rows],
        [row.index for row in rows],
        [row.position for row in rows],
    ):
        state ^= np.array(part, dtype=np.int64).view(np.uint64)
        state += np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token for each row, [rows] int64: candidates lie side by side in the vocabulary's order."""
    return invert(torch.softmax(_scaled(logits, rows), dim=-1), _numbers(logits, rows))


def _draw_truncated(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The same of what truncation leaves, the likeliest first."""
    scaled, ids = _scaled(logits, rows).sort(dim=-1, descending=True, stable=True)
    truncation = Truncation.of([row.params for row in rows], logits.device)
    weights = narrowed(scaled, scaled.logsumexp(dim=-1), truncation, logits.shape[1])
    return ids.gather(1, invert(weights, _numbers(logits, rows)).unsqueeze(1)).squeeze(1)


def _scaled(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return logits / torch.tensor([[row.params.temperature] for row in rows], device=logits.device)


def _numbers(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return torch.from_numpy(uniform(rows)).to(logits.device)


def invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row: the first place where it exceeds number * total."""
    cumulative = weights.double().cumsum(dim=-1)
    thresholds = numbers.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)


def narrowed(scaled: Tensor, log_total: Tensor, truncation: Truncation, vocabulary: int) -> Tensor:
    """The probabilities of each row's likeliest tokens, whose logits over temperature are `scaled`, [rows,
    candidates] in falling order; 0 for those that truncation leaves out. `log_total`: the logarithm of the sum of
    exp over the whole vocabulary, [rows]."""
    top_k = torch.where(truncation.top_k > 0, truncation.top_k, vocabulary).unsqueeze(1)
    top_p, min_p = truncation.top_p.unsqueeze(1), truncation.min_p.unsqueeze(1)
    rank = torch.arange(scaled.shape[1], device=scaled.device).unsqueeze(0)
    kept = rank < top_k
    weights = torch.where(kept, (scaled.double() - log_total.double().unsqueeze(1)).exp(), 0.0)
    cumulative = weights.cumsum(dim=-1)
    # With top-k, top-p is a share of what top-k left; without, of the whole vocabulary.
    total = torch.where(top_k < vocabulary, cumulative[:, -1:], torch.ones_like(cumulative[:, -1:]))
    kept &= (cumulative - weights < top_p * total) | (rank == 0)
    kept &= weights >= min_p * weights[:, :1]
    return torch.where(kept, weights, 0.0)
