"""A causal model of transformers, on packed batches: its modules do all but attention, which reads the pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from scheduler.core.attention import LayerSpec, PackedBatch, attend_sequence
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepOutput

ATTENTION = "carousel_core"
"""What transformers knows our attention by."""

Attend = Callable[[int, LayerSpec, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, what it computes, query, key, value), each [T, heads, size] -> [T, heads, size]."""


class TransformersModel:
    """Reads a model's folder through transformers: safetensors, or a GGUF file as floats. For models whose
    attention modules call transformers' attention interface and hand arguments on, as Llama and its kin do."""

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32) -> None:
        gguf = next(Path(folder).glob("*.gguf"), None)
        self._module: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            config=AutoConfig.from_pretrained(folder),  # or it is read out of the GGUF file, which takes long
            gguf_file=gguf and gguf.name,
            dtype=dtype,
            attn_implementation=ATTENTION,
        )
        self.layers = self._specs()

    @torch.inference_mode()
    def _specs(self) -> list[LayerSpec]:
        """What each layer's attention asks for, seen in a few tokens."""
        specs: dict[int, LayerSpec] = {}
        few = torch.arange(4)
        self._run(
            few,
            few,
            few,
            lambda layer, spec, query, key, value: attend_sequence(
                query, key, value, specs.setdefault(layer, spec)
            ),
        )
        return [specs[layer] for layer in sorted(specs)]

    def bind(self, cache: KVCache, max_len: int) -> None:
        """The pool's tensors are there, and no sequence will be longer than `max_len` tokens."""
        self._cache = cache

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> StepOutput:
        """One step: write the batch's keys and values, and return what its rows give."""
        backend, layers = self._cache.backend, self._cache.layers
        logits = self._run(
            batch.input_ids,
            batch.positions,
            batch.sample_rows,
            lambda layer, spec, query, key, value: backend.attend(query, key, value, layers[layer], batch, spec),
        )
        return StepOutput(logits, states=logits.new_empty(0, 0))

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
        output = self._module(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            attend=attend,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attend: Attend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What the modules call: [1, heads, T, size] in, [1, T, heads, size] out."""
    spec = LayerSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_dim=query.shape[3],
        value_dim=value.shape[3],
        scaling=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        softcap=softcap,
    )
    layer: int = module.layer_idx  # type: ignore[assignment]
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(layer, spec, queries, keys, values).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)
