"""What one sequence's keys and values take in models with sliding windows, and what they would take if every layer
kept them all: by arithmetic, from the models' shapes.

python -m benchmarks.windows
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scheduler.attention import LayerSpec
from scheduler.config import EngineConfig
from scheduler.core.kv_cache import largest
from scheduler.models.memory import bytes_per_block, group_layers, holdings


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides about its KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int
    full_every: int | None
    """Each layer of this number sees everything; None: no layer does."""
    max_len: int

    @property
    def layers(self) -> list[LayerSpec]:
        heads, size = self.num_kv_heads, self.head_dim
        full, narrow = (LayerSpec(heads, heads, size, size, 1.0, window, None) for window in (None, self.window))
        every = self.full_every or self.num_layers + 1
        return [full if number % every == 0 else narrow for number in range(1, self.num_layers + 1)]


MODELS = {
    "Gemma 3 1B": Shape(26, 1, 256, 512, 6, 32768),
    "Gemma 3 4B": Shape(34, 4, 256, 1024, 6, 131072),
    "Gemma 2 2B": Shape(26, 4, 256, 4096, 2, 8192),
    "Mistral 7B v0.1": Shape(32, 8, 128, 4096, None, 32768),
    "Phi-3 mini 4k": Shape(32, 32, 96, 2047, None, 4096),
}


def main() -> int:
    config = EngineConfig()
    print("keys and values of one sequence in bfloat16, MiB")
    print(f"{'model':16} {'tables':>6} {'tokens':>8} {'all kept':>9} {'windows':>8} {'times':>6}")
    for name, shape in MODELS.items():
        layers, groups = shape.layers, group_layers(shape.layers)
        block = bytes_per_block([layers[layer] for layer in largest(groups)], config.block_size, torch.bfloat16)
        held = holdings(config, groups, torch.device("cpu"))
        for tokens in (1024, 8192, 32768, 131072):
            if tokens <= shape.max_len:
                kept = tokens // config.block_size * bytes_per_block(layers, config.block_size, torch.bfloat16)
                taken = held.blocks(tokens) * block
                print(
                    f"{name:16} {len(groups):6} {tokens:8,} {kept / 2**20:9,.0f} {taken / 2**20:8,.0f} "
                    f"{kept / taken:6.1f}"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
