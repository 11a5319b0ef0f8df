"""The experts of a mixture as native products: rows sorted by expert, so that each weight is read once a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scheduler.models.modules.absent_weight import AbsentWeight
from scheduler.models.modules.grouped_linear import GroupedLinear
from scheduler.models.products import PLAIN_MODES, Mode


class PackedExperts(nn.Module):
    """What a module of experts computes: each token's experts, added up by the weights of its router."""

    def __init__(self, experts: nn.Module, name: str, mode: Mode, num_threads: int) -> None:
        """`experts` has no weights any more afterwards; its gate, activation and norm stay in use."""
        super().__init__()
        self._experts = [experts]  # not a part of this module: its weights are absent
        self._up = _packed(experts, "gate_up_proj" if experts.has_gate else "up_proj", mode, num_threads)
        self._down = _packed(experts, "down_proj", mode, num_threads)
        self._num_experts = len(experts.down_proj)  # type: ignore[arg-type]
        self.packed_bytes = self._up.nbytes + self._down.nbytes
        self.num_packed = sum(parameter.numel() for parameter in experts.parameters())
        for weight_name, weight in list(experts.named_parameters(recurse=False)):
            delattr(experts, weight_name)
            setattr(experts, weight_name, AbsentWeight.of(weight, name))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` [T, hidden], and of each token the numbers and weights of its experts, [T, k]."""
        (experts,) = self._experts
        num_tokens, count = top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self._num_experts)
        starts = [0, *counts.cumsum(0).tolist()]
        inner = self._up(hidden_states[order // count], starts)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)  # type: ignore[operator]
        found = self._down(inner, starts)
        if experts.has_post_expert_norm:
            found = experts.post_expert_norm(found)  # type: ignore[operator]
        weighted = torch.empty_like(found)
        weighted[order] = found
        weighted *= top_k_weights.reshape(-1, 1)
        return weighted.view(num_tokens, count, -1).sum(dim=1).to(hidden_states.dtype)


def are_experts(module: nn.Module) -> bool:
    """Whether it is one of transformers' modules of experts, all in one tensor."""
    weight = getattr(module, "down_proj", None)
    marks = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
    return (
        all(hasattr(module, mark) for mark in marks)
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 3
        and weight.dtype in PLAIN_MODES
    )


def _packed(experts: nn.Module, name: str, mode: Mode, num_threads: int) -> GroupedLinear:
    weights: Tensor = getattr(experts, name)
    biases: Tensor | None = getattr(experts, f"{name}_bias") if experts.has_bias else None
    each = [weight.T if experts.is_transposed else weight for weight in weights]
    return GroupedLinear(each, None if biases is None else list(biases), mode, num_threads)
