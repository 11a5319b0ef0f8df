"""What is left of a weight that is packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WeightReadError(RuntimeError):
    """A model computes with a layer's weights by itself, and they are packed; says which layer's."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the weights of {name} are packed, and the model reads them by itself")
        self.name = name


class AbsentWeight(Tensor):
    """What a layer's weights were: their type and shape. Computing with them is an error; without this class torch
    would take whatever is in memory."""

    layer: str

    @classmethod
    def of(cls, weight: Tensor, layer: str) -> AbsentWeight:
        made = Tensor._make_subclass(cls, weight.detach().to("meta"))
        made.layer = layer
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise WeightReadError(next(each.layer for each in args if isinstance(each, cls)))
