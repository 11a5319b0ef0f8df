"""The linear layers of any model as native products: 4 or 8 bits, or bfloat16 and float32 quicker than torch's.

A row of a product has the same bits whatever rows surround it. The norms, activations and the rest of such a model
stay torch's, which does not promise that.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scheduler.kernels.native import NativeBuildError, kernels
from scheduler.models.fused_weights import PLAIN_MODES, Mode
from scheduler.models.paged_model import PagedModel

logger = logging.getLogger(__name__)


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


class PackedLinear(nn.Module):
    """What `linear` computes, over its weights packed once for the products' arithmetic."""

    def __init__(self, linear: nn.Linear, name: str, mode: Mode, num_threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some models look at a layer's dtype before they call it.
        self.weight = AbsentWeight.of(linear.weight, name)
        bias = None if linear.bias is None else linear.bias.detach().float()
        weights = kernels().PackedWeights([linear.weight.detach().contiguous()], bias, mode)
        self.packed_bytes: int = weights.nbytes
        self._product = kernels().PackedLinear(weights)
        self._num_threads = num_threads

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        product: Tensor = self._product(rows, num_threads=self._num_threads)
        return product.view(*x.shape[:-1], self.out_features)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native products cannot serve a model of this type here, or None if they can."""
    if device.type != "cpu":
        return f"the native products are for CPU, the model is on {device.type}"
    if dtype not in PLAIN_MODES:
        return f"the native products take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        kernels()
    except NativeBuildError as error:
        return str(error)
    return None


def pack_linears(model: PagedModel, mode: Mode, num_threads: int) -> PagedModel:
    """`model` with packed linear layers, but for those whose weights it reads by itself. The one given stays as it
    is, and shares all other weights with it."""
    read_directly: set[str] = set()
    while True:
        packed = copy.copy(model)
        packed.module = _packed(model.module, mode, num_threads, read_directly)
        try:
            packed.try_out()
        except WeightReadError as error:
            logger.info("%s stays as it is: the model computes with its weights by itself", error.name)
            read_directly.add(error.name)
        else:
            return packed


def _packed(model: PreTrainedModel, mode: Mode, num_threads: int, kept: Container[str]) -> PreTrainedModel:
    tensors = [*model.parameters(), *model.buffers()]
    module = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, parent in module.named_modules():
        for name, child in parent.named_children():
            whole = f"{path}.{name}"
            # Not its subclasses, which do more than multiply; Conv1D and stacked experts are no linear layers.
            is_plain = type(child) is nn.Linear and child.weight.dtype in PLAIN_MODES and child.weight.numel() > 0
            if is_plain and whole not in kept:
                setattr(parent, name, PackedLinear(child, whole, mode, num_threads))
    return module


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all that a model's modules hold."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = sum(module.packed_bytes for module in model.modules() if isinstance(module, PackedLinear))
    return packed + sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type != "meta")
