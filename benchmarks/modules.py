"""Decode steps of models that transformers' modules compute: Carousel beside these modules by themselves.

    python -m benchmarks.modules

Small models with random weights, in float32 on both sides: 1, 8 and 32 sequences with contexts of 128 tokens, of
which each decodes one token a step; the medians of steps that take turns. Mixtures of experts, latent attention,
sinks, and layers that keep a state. Also what a token takes of the block pool, and where that holds latents what
its keys and values would take.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.processor import processor
from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.models.checks.small_copy import randomize
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams

SIZES: dict[str, Any] = {
    **{"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "max_position_embeddings": 1024},
    **{
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    **{"num_experts_per_tok": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 32, "num_key_value_heads": 2, "head_dim": 64, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 32, "num_key_value_heads": 2, "head_dim": 64},
    "deepseek_v3": {
        **{"n_routed_experts": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 32},
        **{
            "q_lora_rank": 192,
            "kv_lora_rank": 128,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
        },
    },
    "gpt_oss": {"num_local_experts": 32, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "qwen3_next": {"num_experts": 32, "num_key_value_heads": 2, "head_dim": 64, "decoder_sparse_step": 1},
}

CONTEXT, NUM_STEPS = 128, 30


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{processor()}: milliseconds of a decode step, Carousel / transformers")
    for name, changes in MODELS.items():
        config = AutoConfig.for_model(name, **{**SIZES, **changes})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
        randomize(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            core = EngineCore(EngineConfig(dtype="float32", quantization="none", kv_cache_memory="2GB"), folder)
        for rows in (1, 8, 32):
            ours, theirs = measure(core, model, rows)
            print(f"{name:12} {rows:2} rows: {ours:7.1f} / {theirs:7.1f}  ({theirs / ours:.2f} times as fast)")
        per_token = core.info.pool_bytes / core.info.num_blocks / core.info.block_size
        said = f"{name:12} a token takes {per_token:.0f} bytes of the pool"
        if getattr(config, "kv_lora_rank", None):
            heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
            said += f"; its keys and values would take {config.num_hidden_layers * heads * 4}"
        print(said)


@torch.inference_mode()
def measure(core: EngineCore, model: PreTrainedModel, rows: int) -> tuple[float, float]:
    """Milliseconds of a step of each, in the median."""
    prompts = [[(3 + 7 * place * (row + 2)) % 4000 + 3 for place in range(CONTEXT)] for row in range(rows)]
    params = SamplingParams(temperature=0, max_tokens=2 * NUM_STEPS, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        core.add(Request(request_id=str(row), prompt_token_ids=prompt, params=params))
    while any(sequence.num_output_tokens < 2 for sequence in core.scheduler.running.values()) or (
        core.scheduler.num_waiting
    ):
        core.step()
    cache = DynamicCache(config=model.config)
    named = inspect.signature(model.forward).parameters
    kept: dict[str, Any] = {"cache" if "cache" in named else "past_key_values": cache, "use_cache": True}
    tokens = model(torch.tensor(prompts), **kept).logits[:, -1:].argmax(-1)
    ours, theirs = [], []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        core.step()
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        tokens = model(tokens, **kept).logits[:, -1:].argmax(-1)
        theirs.append(time.perf_counter() - started)
    for row in range(rows):
        core.abort(str(row))
    while core.has_work:
        core.step()
    return 1000 * statistics.median(ours), 1000 * statistics.median(theirs)


if __name__ == "__main__":
    main()
