"""Latent attention with nothing but the latent in the block pool.

Keys and values of all heads are products of one latent a token (DeepSeek-V2, arXiv 2405.04434, section 2.1).
The products move to the other side: a head's query times W_k is compared with the latent itself, and its sum of
latents is multiplied by W_v. So all heads share one key, the latent with the rotary part behind it, and one value,
the latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scheduler.models.modules.grouped_linear import GroupedLinear
from scheduler.models.products import Mode

NAME = "carousel_latent"
"""Of the attribute by which an attention module has it."""


class Latent:
    """How one attention module's heads read latents. Takes the place of the module's own way to expand them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.key_size: int = module.qk_nope_head_dim  # type: ignore[assignment]
        self.value_size: int = module.v_head_dim  # type: ignore[assignment]

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of keys, [num_heads, key size, latent], and of values, [num_heads, value size, latent]."""
        weight: Tensor = self._module.kv_b_proj.weight  # type: ignore[union-attr, assignment]
        of_heads = weight.view(-1, self.key_size + self.value_size, weight.shape[1])
        return of_heads[:, : self.key_size], of_heads[:, self.key_size :]

    def keys_and_values(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """What the module takes for keys and values of its heads: those that all heads share."""
        return torch.cat([latent, rotary], dim=-1), latent

    def queries(self, queries: Tensor) -> Tensor:
        """[T, num_heads, key size + rotary] to [T, num_heads, latent + rotary]."""
        plain, rotary = queries[..., : self.key_size], queries[..., self.key_size :]
        return torch.cat([self._absorbed(plain), rotary], dim=-1)

    def _absorbed(self, queries: Tensor) -> Tensor:
        return torch.einsum("thk,hkl->thl", queries, self.weights()[0])

    def outputs(self, sums: Tensor) -> Tensor:
        """[T, num_heads, latent] to [T, num_heads, value size]."""
        return torch.einsum("thl,hvl->thv", sums, self.weights()[1])


class PackedLatent(Latent):
    """The same with native products, of all heads in one call."""

    def __init__(self, latent: Latent, mode: Mode, num_threads: int) -> None:
        self.key_size, self.value_size = latent.key_size, latent.value_size
        of_keys, of_values = latent.weights()
        self._of_queries = GroupedLinear([weight.T for weight in of_keys], None, mode, num_threads)
        self._of_outputs = GroupedLinear(list(of_values), None, mode, num_threads)
        self.packed_bytes = self._of_queries.nbytes + self._of_outputs.nbytes
        self.num_packed = of_keys.numel() + of_values.numel()

    def _absorbed(self, queries: Tensor) -> Tensor:
        return _by_head(self._of_queries, queries)

    def outputs(self, sums: Tensor) -> Tensor:
        return _by_head(self._of_outputs, sums)


def absorb(model: nn.Module) -> None:
    """Let the attention of a model that expands latents read them as they are."""
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            install(module, Latent(module))


def install(module: nn.Module, latent: Latent) -> None:
    setattr(module, NAME, latent)
    module.expand_kv = latent.keys_and_values  # type: ignore[assignment]


def latent_of(module: nn.Module) -> Latent | None:
    return getattr(module, NAME, None)


def _by_head(product: GroupedLinear, rows: Tensor) -> Tensor:
    """[T, num_heads, in_features] to [T, num_heads, out_features]."""
    num_tokens, num_heads, size = rows.shape
    starts = list(range(0, num_heads * num_tokens + 1, num_tokens))
    found = product(rows.transpose(0, 1).reshape(-1, size), starts)
    return found.view(num_heads, num_tokens, -1).transpose(0, 1)
