"""The products of any model as native ones: 4 or 8 bits, or bfloat16 and float32 quicker than torch's.

A row of a product has the same bits whatever rows surround it. The norms, activations and the rest of such a model
stay torch's, which does not promise that.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Container, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from scheduler.kernels.library import Product
from scheduler.kernels.native import kernels
from scheduler.models.modules.absent_weight import AbsentWeight, WeightReadError
from scheduler.models.modules.latent_attention import PackedLatent, install, latent_of
from scheduler.models.modules.packed_experts import PackedExperts, are_experts
from scheduler.models.modules.paged_model import PagedModel
from scheduler.models.products import PLAIN_MODES, Mode

logger = logging.getLogger(__name__)

FALCON = "FalconLinear"
"""A linear layer that adds its bias in a step of its own."""


class PackedLinear(nn.Module):
    """What `linear` computes, over its weights packed once for the products' arithmetic."""

    def __init__(self, linear: nn.Linear, name: str, mode: Mode, num_threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some models look at a layer's dtype before they call it.
        self.weight = AbsentWeight.of(linear.weight, name)
        bias = None if linear.bias is None else linear.bias.detach().float()
        weights = kernels().pack([linear.weight.detach().contiguous()], bias, mode)
        self.packed_bytes: int = weights.nbytes
        self.num_packed = sum(parameter.numel() for parameter in linear.parameters())
        self._product = Product(weights)
        self._num_threads = num_threads

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        product: Tensor = self._product(rows, num_threads=self._num_threads)
        return product.view(*x.shape[:-1], self.out_features)


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
    for path, parent in list(module.named_modules()):
        if (latent := latent_of(parent)) is not None:
            install(parent, PackedLatent(latent, mode, num_threads))
            parent.kv_b_proj = None  # nobody asks for it any more
        for name, child in parent.named_children():
            whole = f"{path}.{name}"
            # Not other subclasses, which do more than multiply; Conv1D is no linear layer.
            is_linear = type(child) is nn.Linear or type(child).__name__ == FALCON
            is_plain = is_linear and child.weight.dtype in PLAIN_MODES and child.weight.numel() > 0
            if is_plain and whole not in kept:
                setattr(parent, name, PackedLinear(child, whole, mode, num_threads))
            elif are_experts(child) and whole not in kept:
                setattr(parent, name, PackedExperts(child, whole, mode, num_threads))
    return module


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all that a model's modules hold."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = sum(part.packed_bytes for part in _packed_parts(model))
    return packed + sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type != "meta")


def num_weights(model: nn.Module) -> int:
    """How many numbers a model has learned."""
    plain = sum(parameter.numel() for parameter in model.parameters())
    return plain + sum(part.num_packed for part in _packed_parts(model))


def _packed_parts(model: nn.Module) -> Iterator[PackedLinear | PackedExperts | PackedLatent]:
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedExperts):
            yield module
        elif isinstance(latent := latent_of(module), PackedLatent):
            yield latent
