"""What each arithmetic costs on the default model, against float32 of the same weights.

    python -m benchmarks.quality

Perplexity of a chapter of a book, and the mean KL divergence of the next token's distribution, for each mode of
the products and each type of the keys and values.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm

from scheduler.attention import AttentionBackend
from scheduler.attention.native_backend import NativeAttention
from scheduler.config import DEFAULT_MODEL, EngineConfig
from scheduler.core.model import StepModel
from scheduler.machine.processor import instruction_set
from scheduler.models.checks.quantization import TextLogprobs, kl_divergence, perplexity, text_tokens
from scheduler.models.files.model_source import resolve_model
from scheduler.models.loading import usable_cpus
from scheduler.models.model_config import read_config
from scheduler.models.products import Mode
from scheduler.models.sources import open_source

MODES: dict[str, Mode] = {"float32": "f32", "bfloat16": "bf16", "int8": "int8", "int4": "int4", "stored": "stored"}
KV_TYPES = (torch.float32, torch.bfloat16)


def pack(path: str, mode: Mode, num_threads: int) -> StepModel:
    """What the file has as floats is multiplied in float32, unless bfloat16 is asked for."""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    config: Any = EngineConfig(model=path)
    source = open_source(
        config, path, read_config(path), device=torch.device("cpu"), dtype=dtype, num_threads=num_threads
    )
    if mode == "stored" and not source.has_stored_weights:
        raise ValueError("the model has no stored weights")
    return source.pack(mode).model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"(default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE",
        help=f"of {', '.join(MODES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N", help="take only the text's first (default: all)")
    args = parser.parse_args()
    num_threads = usable_cpus()
    torch.set_num_threads(num_threads)
    path = resolve_model(args.model)
    token_ids = text_tokens(path)[: args.tokens]
    backend: AttentionBackend = NativeAttention(num_threads)
    reference = pack(path, "f32", num_threads)
    best = perplexity(reference, backend, token_ids, torch.float32)
    print(f"{args.model} on {instruction_set()}, {len(token_ids)} tokens; float32: perplexity {best:.4f}")
    print("  products  keys and values  perplexity     cost   KL divergence (nats)")
    for name in tqdm(args.modes, desc="quality", unit="mode", leave=False):
        model = pack(path, MODES[name], num_threads)
        for kv_type in KV_TYPES:
            value = perplexity(model, backend, token_ids, kv_type)
            divergence = kl_divergence(
                TextLogprobs(reference, backend, torch.float32), TextLogprobs(model, backend, kv_type), token_ids
            )
            kv_name = str(kv_type).removeprefix("torch.")
            tqdm.write(f"  {name:<9} {kv_name:<15} {value:11.4f} {value / best - 1:+8.2%} {divergence:12.6f}")


if __name__ == "__main__":
    main()
