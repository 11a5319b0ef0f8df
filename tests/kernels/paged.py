"""A paged batch made of random sequences, and the attention it should give, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scheduler.kernels.native import kernels


@dataclass
class Batch:
    """Packed queries and a paged cache whose unused slots hold NaN."""

    q: Tensor  # [T, H, D]
    keys: list[Tensor]  # per sequence [context, Hkv, D], as the cache holds them
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor

    latent_dim: int = 0

    def attend(self, **options: Any) -> Tensor:
        return kernels().paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.query_start,
            self.context_lens,
            latent_dim=self.latent_dim,
            **options,
        )


def page(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    query_lens: list[int],
    block_size: int,
    cache: torch.dtype,
    *,
    latent_dim: int = 0,
) -> Batch:
    """Puts the sequences into blocks drawn at random from a pool three blocks too large. With a `latent_dim` the
    values are so many numbers of the keys, and have no place of their own."""
    num_kv_heads, head_dim = keys[0].shape[1:]
    value_dim = 0 if latent_dim else values[0].shape[2]
    counts = [-(-len(k) // block_size) for k in keys]
    ids = torch.randperm(sum(counts) + 3).tolist()
    k_cache = torch.full((len(ids), num_kv_heads, head_dim, block_size), torch.nan, dtype=cache)
    v_cache = torch.full((len(ids), num_kv_heads, block_size, value_dim), torch.nan, dtype=cache)
    tables = torch.full((len(keys), max(counts) + 1), -1, dtype=torch.int32)
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        for b in range(counts[s]):
            tables[s, b] = ids.pop()
        positions = torch.arange(len(k))
        slots = tables[s, positions // block_size].long() * block_size + positions % block_size
        kernels().write_kv(k, v[..., :value_dim].contiguous(), slots, k_cache, v_cache, latent_dim)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    contexts = torch.tensor([len(k) for k in keys], dtype=torch.int32)
    stored_k, stored_v = [k.to(cache) for k in keys], [v.to(cache) for v in values]
    return Batch(q, stored_k, stored_v, k_cache, v_cache, tables, starts, contexts, latent_dim)


def random_batch(
    lens: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    cache: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    value_dim: int | None = None,
    latent_dim: int = 0,
) -> Batch:
    """`lens`: (query length, context length) of each sequence; values are as wide as keys by default."""
    q = torch.randn(sum(n for n, _ in lens), heads, head_dim, dtype=dtype)
    keys = [torch.randn(c, kv_heads, head_dim) for _, c in lens]
    if latent_dim:
        values = [key[..., :latent_dim].contiguous() for key in keys]
    else:
        values = [torch.randn(c, kv_heads, value_dim or head_dim) for _, c in lens]
    return page(q, keys, values, [n for n, _ in lens], block_size, cache, latent_dim=latent_dim)


def attention_oracle(
    batch: Batch,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """float64 attention, one sequence at a time, over dense keys and values."""
    outputs = []
    group = batch.q.shape[1] // batch.keys[0].shape[1]
    for s, (k, v) in enumerate(zip(batch.keys, batch.values, strict=True)):
        q = batch.q[batch.query_start[s] : batch.query_start[s + 1]].double()
        key, value = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(len(k) - len(q), len(k))[:, None]
        j = torch.arange(len(k))[None, :]
        hidden = j > i
        if sliding_window:
            hidden |= j <= i - sliding_window
        if chunk:
            hidden |= j // chunk != i // chunk
        if slopes is not None:
            scores = scores + slopes[:, None, None] * (j - i)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:  # one more score, whose value is nothing
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1).double()], -1)
        weights = scores.softmax(-1)[..., : len(k)]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(outputs).to(batch.q.dtype)
