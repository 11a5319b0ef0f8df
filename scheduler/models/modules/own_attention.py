"""Models that attend by themselves, and not through transformers' interface: Bloom, MPT, Falcon and GPT-Neo.

Their modules make queries, keys and values, and read what attention gives; what lies between goes to the block
pool here. In the first three a key counts the less the further it is behind the query, by a slope for each head
(ALiBi, Press et al., arXiv 2108.12409).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from scheduler.models.modules.attention_interface import ATTENTION, attention_forward

TYPES = ("bloom", "mpt", "falcon", "gpt_neo")


def attends_by_itself(config: PretrainedConfig) -> bool:
    """Whether models of this type know nothing of transformers' interface."""
    return config.model_type in TYPES


def attention_of(config: PretrainedConfig) -> str | None:
    """The name of the attention with which a model is made that is to use the pool; None: its own."""
    return None if attends_by_itself(config) else ATTENTION


def take_over(model: nn.Module) -> None:
    """Let the attention modules of a model that attends by itself call the interface."""
    for module in model.modules():
        if (kind := KINDS.get(type(module).__name__)) is not None:
            module.forward = kind(module)


class _Heads(NamedTuple):
    """What attention begins with, [1, heads, T, head_dim] each."""

    query: Tensor
    key: Tensor
    value: Tensor


class _Forward(ABC):
    """Takes the place of an attention module's forward pass."""

    output = "dense"
    """The name of its last projection."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.scaling = self.find_scaling()
        self.slopes = self.find_slopes()
        self.window = self.find_window()

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, None]:
        heads = self.begin(hidden_states, named)
        attended, _ = attention_forward(self.module, *heads, None, self.scaling, self.window, slopes=self.slopes)
        return self.end(attended.flatten(2), *arguments), None

    def find_scaling(self) -> float:
        scaling: float = self.module.inv_norm_factor
        return scaling

    def find_slopes(self) -> Tensor | None:
        """[heads] float32, if scores fall with the distance."""
        return None

    def find_window(self) -> int | None:
        """In tokens, if it sees no more."""
        return None

    @abstractmethod
    def begin(self, hidden: Tensor, named: dict[str, Any]) -> _Heads: ...

    def end(self, attended: Tensor, *arguments: Any) -> Tensor:
        """From [1, T, heads * head_dim]."""
        output: Tensor = getattr(self.module, self.output)(attended)
        return output


def _alibi_slopes(num_heads: int) -> Tensor:
    """[heads] float32, as Bloom has them."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    of_two_tokens: Tensor = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)
    return of_two_tokens[:, 0, 1].contiguous()


class _Bloom(_Forward):
    def find_slopes(self) -> Tensor | None:
        return _alibi_slopes(self.module.num_heads)

    def begin(self, hidden: Tensor, named: dict[str, Any]) -> _Heads:
        return _Heads(*self.module._reshape(self.module.query_key_value(hidden)))

    def end(self, attended: Tensor, *arguments: Any) -> Tensor:
        (residual,) = arguments
        output: Tensor = super().end(attended) + residual
        return output


class _Mpt(_Forward):
    output = "out_proj"

    def find_scaling(self) -> float:
        scaling: float = self.module.softmax_scale
        return scaling

    def find_slopes(self) -> Tensor | None:
        from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

        of_two_tokens: Tensor = build_mpt_alibi_tensor(self.module.n_heads, 2)  # type: ignore[no-untyped-call]
        return -of_two_tokens[:, 0, 0]

    def begin(self, hidden: Tensor, named: dict[str, Any]) -> _Heads:
        joined = self.module.Wqkv(hidden)
        if limit := self.module.clip_qkv:
            joined = joined.clamp(min=-limit, max=limit)
        heads = joined.unflatten(2, (3, self.module.n_heads, self.module.head_dim))
        return _Heads(*(part.transpose(1, 2) for part in heads.unbind(2)))


class _Falcon(_Forward):
    def find_slopes(self) -> Tensor | None:
        return _alibi_slopes(self.module.num_heads) * self.scaling if self.module.config.alibi else None

    def begin(self, hidden: Tensor, named: dict[str, Any]) -> _Heads:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        parts = self.module._split_heads(self.module.query_key_value(hidden))
        query, key, value = (part.transpose(1, 2) for part in parts)
        if self.module.new_decoder_architecture:  # there they are repeated for each query head
            times = self.module.num_heads // self.module.num_kv_heads
            key, value = key[:, ::times], value[:, ::times]
        if not self.module.config.alibi:
            turned = named["position_embeddings"]
            query, key = apply_rotary_pos_emb(query, key, *turned)  # type: ignore[no-untyped-call]
        return _Heads(query, key, value)


class _GptNeo(_Forward):
    output = "out_proj"

    def __init__(self, module: Any) -> None:
        module.layer_idx = module.layer_id
        super().__init__(module)

    def find_scaling(self) -> float:
        return 1.0

    def find_window(self) -> int | None:
        return self.module.config.window_size if self.module.attention_type == "local" else None

    def begin(self, hidden: Tensor, named: dict[str, Any]) -> _Heads:
        sizes = (self.module.num_heads, self.module.head_dim)
        projections = (self.module.q_proj, self.module.k_proj, self.module.v_proj)
        return _Heads(*(project(hidden).unflatten(2, sizes).transpose(1, 2) for project in projections))


KINDS: dict[str, type[_Forward]] = {
    "BloomAttention": _Bloom,
    "MptAttention": _Mpt,
    "FalconAttention": _Falcon,
    "GPTNeoSelfAttention": _GptNeo,
}
"""By the names of their classes: to import them takes a while."""
