"""How a model that was trained for embeddings makes them, as sentence-transformers writes it beside the model:
modules.json names a folder for each part after the model itself, and each has a config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.core.sampling import Pooling

POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
"""By sentence-transformers' names, the older of which follow `pooling_mode_`."""

ACTIVATIONS = ("Identity", "Tanh")
"""Of torch.nn: those after the layers that are applied here."""


@dataclass(frozen=True, slots=True)
class EmbeddingLayout:
    pooling: Pooling | None
    """None: it is not done here."""
    layers: list[str] = field(default_factory=list)
    """Folders of the dense layers after it, in their order."""
    size: int | None = None
    """Dimensions that the last of them gives."""


def embedding_layout(folder: Path) -> EmbeddingLayout:
    """That of a model's folder; the mean, where it says nothing."""
    parts = _json(folder / "modules.json")
    if not isinstance(parts, list):
        config = _json(folder / "1_Pooling" / "config.json")
        return EmbeddingLayout(_pooling(config) if isinstance(config, dict) else "mean")
    pooling: Pooling | None = None
    layers: list[str] = []
    size: int | None = None
    for part in parts:
        kind, path = str(part.get("type")).rpartition(".")[2], folder / str(part.get("path", ""))
        config = _json(path / "config.json") or {}
        match kind:
            case "Transformer" | "Normalize":  # whether they are given the length 1 a request says
                continue
            case "Pooling":
                pooling = _pooling(config)
            case "Dense" if _is_plain(config) and (path / "model.safetensors").is_file():
                layers.append(str(path))
                size = int(config["out_features"])
            case _:
                return EmbeddingLayout(None)
    return EmbeddingLayout(pooling, layers, size)


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether a dense layer is of the kind that is applied here: to a whole text's vector, and nothing added."""
    activation = str(config.get("activation_function")).rpartition(".")[2]
    takes = config.get("module_input_name", "sentence_embedding")
    return activation in ACTIVATIONS and takes == "sentence_embedding" and not config.get("use_residual")


def _pooling(config: dict[str, Any]) -> Pooling | None:
    """sentence-transformers 5.4 writes `pooling_mode`, and a key for each kind before."""
    names = config.get("pooling_mode")
    if names is None:
        prefix = "pooling_mode_"
        names = [key.removeprefix(prefix) for key, wanted in config.items() if key.startswith(prefix) and wanted]
    names = [names] if isinstance(names, str) else names
    return POOLINGS.get(names[0]) if len(names) == 1 else None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
