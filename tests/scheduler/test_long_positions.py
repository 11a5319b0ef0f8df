"""Models that have other positions for long texts (longrope): each token is that of a fresh forward pass over all
that is before it, on both sides of the length, in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from scheduler.config import EngineConfig
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.engine_runs import ANY, Preempting, run_all
from tests.scheduler.test_families import tiny_model

ORIGINAL, WHOLE = 64, 256
NUM_TOKENS = 24

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

PROMPTS = [
    [3 + (7 * place + start) % 90 for place in range(length)]
    for start, length in ((0, 20), (1, 50), (2, ORIGINAL - 1), (3, ORIGINAL), (4, ORIGINAL + 1), (5, 150))
]
"""Short, short until its answer is long, and long."""


@pytest.fixture(params=["phi3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    count = 8
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL}
    factors = {"short_factor": [1.0 + place / 8 for place in range(count)], "long_factor": [4.0] * count}
    made = tiny_model(
        request.param,
        **({"head_dim": 2 * count} if request.param == "llama" else {}),
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=WHOLE,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope | factors,
        pad_token_id=0,
    )
    made.save_pretrained(tmp_path)
    return made


def core_of(folder: Path, **knobs: Any) -> EngineCore:
    config: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "4MB", "longest_step_ms": ANY}
    return EngineCore(EngineConfig(**(config | knobs)), str(folder))


@torch.inference_mode()
def fresh(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_each_token_is_that_of_a_fresh_forward_pass(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = [fresh(model, prompt) for prompt in PROMPTS]
    core = core_of(tmp_path)
    assert core.info.max_model_len == WHOLE
    together = run_all(core, PROMPTS, GREEDY)
    assert together.tokens == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert run_all(core_of(tmp_path), [prompt], GREEDY).tokens == [tokens]
    again = run_all(core, PROMPTS, GREEDY)  # with what is cached, of texts that were short and became long
    assert again.tokens == expected
    assert again.num_cached_tokens > 0
    chunked = run_all(core_of(tmp_path, max_batched_tokens=16, max_num_seqs=4), PROMPTS, GREEDY)
    assert chunked.tokens == expected
    guessed = run_all(core_of(tmp_path, speculative="ngram"), PROMPTS, GREEDY)
    assert guessed.tokens == expected


def test_after_preemptions(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = [fresh(model, prompt) for prompt in PROMPTS]
    core = core_of(tmp_path)
    preempting = Preempting(core)
    assert run_all(core, PROMPTS, GREEDY).tokens == expected
    assert preempting.victims
