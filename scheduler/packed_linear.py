"""The linear layers of any model as native products: int8, or bfloat16 and float32 quicker than torch's.

A row of a product has the same bits whatever rows surround it. The norms, activations and the rest of such a model
stay torch's, which does not promise that.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from scheduler.fused_model import Mode
from scheduler.model import PagedModel
from scheduler.native import NativeBuildError, kernels

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """What `linear` computes, over its weights packed once for the products' arithmetic."""

    def __init__(self, linear: nn.Linear, mode: Mode, num_threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some models look at a layer's dtype before they call it. Without storage: the packed weights replace it.
        self.weight = linear.weight.detach().to("meta")
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._product = kernels().PackedLinear(linear.weight.detach().contiguous(), bias, mode)
        self._num_threads = num_threads

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        product: Tensor = self._product(rows, num_threads=self._num_threads)
        return product.view(*x.shape[:-1], self.out_features)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native products cannot serve a model of this type here, or None if they can."""
    if device.type != "cpu":
        return f"the native products are for CPU, the model is on {device.type}"
    if dtype not in _DTYPES:
        return f"the native products take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        kernels()
    except NativeBuildError as error:
        return str(error)
    return None


def pack_linears(model: PagedModel, mode: Mode, num_threads: int) -> PagedModel:
    """`model` with packed linear layers. The one given stays as it is, and shares all other weights with it."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    module = copy.deepcopy(model.module, {id(tensor): tensor for tensor in tensors})
    for parent in module.modules():
        for name, child in parent.named_children():
            # Not its subclasses, which do more than multiply; Conv1D and stacked experts are no linear layers.
            if type(child) is nn.Linear and child.weight.dtype in _DTYPES and child.weight.numel() > 0:
                setattr(parent, name, PackedLinear(child, mode, num_threads))
    packed = copy.copy(model)
    packed.module = module
    return packed
