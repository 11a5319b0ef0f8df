"""An embedding in the making: its parts come with the steps that compute the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from scheduler.core.sampling import Pooling


class DenseLayer(NamedTuple):
    """What sentence-transformers calls Dense: activation(weight @ vector + bias)."""

    weight: npt.NDArray[np.float64]
    """[to, from]."""
    bias: npt.NDArray[np.float64]
    has_tanh: bool

    def __call__(self, vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = self.weight @ vector + self.bias
        return np.tanh(found) if self.has_tanh else found


@cache
def dense_layer(folder: str) -> DenseLayer:
    """That of a folder (models/files/embedding_layout.py). Raises OSError where it cannot be read."""
    config = json.loads((Path(folder) / "config.json").read_bytes())
    tensors = load_file(Path(folder) / "model.safetensors")
    weight = tensors["linear.weight"].astype(np.float64)
    bias = tensors["linear.bias"].astype(np.float64) if "linear.bias" in tensors else np.zeros(len(weight))
    return DenseLayer(weight, bias, config["activation_function"].endswith("Tanh"))


class Embedding:
    """Of one prompt, of `num_tokens` tokens; `layers`: folders of the dense layers after the pooling. The parts
    are exact sums (see `ChunkResult.pooled`), so that the vector has the same bits however the prompt was cut into
    chunks."""

    def __init__(self, pooling: Pooling, num_tokens: int, layers: Sequence[str] = ()) -> None:
        self._layers = [dense_layer(folder) for folder in layers]
        self._count = num_tokens if pooling == "mean" else 1
        self._sum: npt.NDArray[np.float64] = np.zeros(())

    def add(self, part: Sequence[float]) -> None:
        """The next part, [hidden size]; empty where a step had none."""
        if part:
            self._sum = self._sum + np.array(part)

    def vector(self, *, normalize: bool) -> npt.NDArray[np.float32]:
        """[dimensions], of length 1 if it is to be normalized."""
        vector = self._sum / self._count
        for layer in self._layers:
            vector = layer(vector)
        if normalize:
            vector = vector / (np.linalg.norm(vector) or 1.0)
        return np.asarray(vector, dtype=np.float32)
