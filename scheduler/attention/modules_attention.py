"""No paged attention: the model attends by itself."""

from __future__ import annotations

from typing import Any

import torch


class ModulesAttention:
    """Stands for the attention of models that keep their keys and values themselves."""

    name = "modules"

    def allocate(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("nothing of such a model is in the block pool")

    def attend(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("such a model attends by itself")
