"""An embedding in the making: its parts come with the steps that compute the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.sampling_params import Pooling


class Embedding:
    """Of one prompt, of `num_tokens` tokens. The parts are exact sums (see `StepResult.pooled`), so that the
    vector has the same bits however the prompt was cut into chunks."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self._count = num_tokens if pooling == "mean" else 1
        self._sum: npt.NDArray[np.float64] = np.zeros(())

    def add(self, part: Sequence[float]) -> None:
        """The next part, [hidden size]; empty where a step had none."""
        if part:
            self._sum = self._sum + np.array(part)

    def vector(self, *, normalize: bool) -> npt.NDArray[np.float32]:
        """[hidden size], of length 1 if it is to be normalized."""
        mean = self._sum / self._count
        if normalize:
            mean = mean / (np.linalg.norm(mean) or 1.0)
        return np.asarray(mean, dtype=np.float32)
