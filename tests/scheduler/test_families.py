"""Tiny random-weight models of many families: the paged batch gives what transformers' `generate` gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scheduler.attention import LayerSpec
from scheduler.config import EngineConfig
from scheduler.core.kv_cache import largest
from scheduler.models.memory import bytes_per_block, group_layers, holdings
from scheduler.models.model_config import UnsupportedModelError
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import run_all

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-8-heads": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "gemma2": ("gemma2", {"sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 6,
            "sliding_window_pattern": 3,
        },
    ),
    "phi3": ("phi3", {"head_dim": 8}),
    "olmo2": ("olmo2", {"head_dim": 8}),
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": 6, "head_dim": 8}),
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    # Freshly made models are almost uniform: spread the weights, so that attention and logits have contrast.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4.0 if "embed" not in name else 20.0)
    return model


def least_memory(layers: list[LayerSpec], num_tokens: int, **knobs: Any) -> int:
    """Bytes of the smallest pool, in float32, that holds one sequence of so many tokens."""
    config = EngineConfig(**knobs)
    groups = group_layers(layers)
    places = [layers[layer] for layer in largest(groups)]
    held = holdings(config, groups, torch.device("cpu")).blocks(num_tokens)
    return held * bytes_per_block(places, config.block_size, torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({}, id="whole"),
        pytest.param({"max_batched_tokens": 16, "block_size": 16}, id="chunked"),
        pytest.param({"max_batched_tokens": 16, "fused": False}, id="chunked-modules"),
        pytest.param({"fused": False, "attention_backend": "torch"}, id="torch"),
        pytest.param(
            {"block_size": 4, "max_batched_tokens": 16, "max_model_len": 160, "kv_cache_memory": "least"},
            id="preempted",
        ),
    ],
)
def test_family(name: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 199) for _ in range(length)] for length in (1, 3, 7, 16, 17, 40, 64, 90)]
    expected = [reference(model, prompt, 24) for prompt in prompts]
    assert len({tuple(one.tokens) for one in expected}) > 4, "the model says the same whatever it is asked"

    if "kv_cache_memory" in knobs:
        probe = EngineCore(EngineConfig(dtype="float32", max_model_len=32), str(tmp_path))
        knobs = {
            **knobs,
            "kv_cache_memory": least_memory(probe.model.layers, 160, block_size=4, max_batched_tokens=16),
        }
    core = EngineCore(EngineConfig(dtype="float32", **knobs), str(tmp_path))
    run = run_all(core, prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=0))
    assert count_ties(run.tokens, expected) == 0
    if "kv_cache_memory" in knobs:
        assert run.num_preemptions > 0


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        EngineCore(EngineConfig(dtype="float32"), str(tmp_path))
