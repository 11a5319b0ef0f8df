"""The linear layers of any model as native products: 4 or 8 bits, or bfloat16 and float32 quicker than torch's.

A row of a product has the same bits whatever rows surround it. The norms, activations and the rest of such a model
stay torch's, which does not promise that.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from scheduler.kernels.native import NativeBuildError, kernels
from scheduler.models.fused_weights import PLAIN_MODES, Mode
from scheduler.models.paged_model import PagedModel


class PackedLinear(nn.Module):
    """What `linear` computes, over its weights packed once for the products' arithmetic."""

    def __init__(self, linear: nn.Linear, mode: Mode, num_threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some models look at a layer's dtype before they call it. Without storage: the packed weights replace it.
        self.weight = linear.weight.detach().to("meta")
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
    """`model` with packed linear layers. The one given stays as it is, and shares all other weights with it."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    module = copy.deepcopy(model.module, {id(tensor): tensor for tensor in tensors})
    for parent in module.modules():
        for name, child in parent.named_children():
            # Not its subclasses, which do more than multiply; Conv1D and stacked experts are no linear layers.
            if type(child) is nn.Linear and child.weight.dtype in PLAIN_MODES and child.weight.numel() > 0:
                setattr(parent, name, PackedLinear(child, mode, num_threads))
    packed = copy.copy(model)
    packed.module = module
    return packed


def weights_bytes(model: PagedModel) -> int:
    """Bytes of all that the model's modules hold."""
    tensors = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    packed = sum(module.packed_bytes for module in model.module.modules() if isinstance(module, PackedLinear))
    return packed + sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type != "meta")
