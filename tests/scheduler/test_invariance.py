"""Same bits, whoever rides along: tokens and logprobs of a request do not depend on its company or its history.

With a small model; `make prove` does the same with the default model, which takes minutes.
"""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.families.gguf_writer import write_gguf
from benchmarks.prove import answers
from scheduler.config import EngineConfig
from scheduler.models.memory import bytes_per_block
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.engine_runs import ANY
from tests.scheduler.test_families import tiny_model

PARAMS = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, seed=0, logprobs=5)
MODES = {
    "stored": {"quantization": "stored"},
    "stored-float32-cache": {"quantization": "stored", "kv_cache_dtype": "float32"},
    "int4": {"quantization": "int4"},
    "int8": {"quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "float32": {"dtype": "float32", "quantization": "none"},
    "float32-bfloat16-cache": {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
}
STEERED = SamplingParams(
    temperature=0.8,
    max_tokens=64,
    ignore_eos=True,
    min_tokens=20,
    stop_token_ids=frozenset({13}),
    seed=0,
    logprobs=5,
    prompt_logprobs=2,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias={7: 3.0, 9: -50.0},
    bad_words=((8,), (7, 11)),
)
ONE = 5
"""The prompt whose answer is watched."""


def check_invariance(mode: str, path: str, prompts: list[list[int]], params: SamplingParams = PARAMS) -> None:
    def engine(**knobs: object) -> EngineCore:
        return EngineCore(EngineConfig(**MODES[mode], **{"kv_cache_memory": "16MB", **knobs}), path)

    core = engine()
    (alone,), _ = answers(core, [prompts[ONE]], params)
    assert len(alone.logprobs) == len(alone.tokens) > 19

    (cached,), _ = answers(core, [prompts[ONE]], params)
    assert cached == alone, "its prefix was cached"

    together, _ = answers(core, prompts, params)
    assert together[ONE] == alone, "among 31 others"

    chunked, _ = answers(engine(max_batched_tokens=16), prompts, params)
    assert chunked[ONE] == alone, "in chunks of 16 tokens"

    block = bytes_per_block(core.model.layers, 16, getattr(torch, core.info.kv_cache_dtype))
    tight = engine(kv_cache_memory=75 * block, max_model_len=700, longest_step_ms=ANY)
    squeezed, num_preemptions = answers(tight, prompts, params)
    assert num_preemptions > 0
    assert squeezed == together, "after preemption"


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose matrices are stored in blocks of several types."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny_model("llama", hidden_size=96, intermediate_size=128, max_position_embeddings=1024)
    model.config.save_pretrained(folder)
    kinds = {"attn_v.weight": "Q8_0", "ffn_down.weight": "Q5_1", "output.weight": "Q5_0", "": "Q4_1"}
    write_gguf(model, folder / "model.gguf", kinds)
    return str(folder)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_logprobs_have_the_same_bits(mode: str, small_path: str) -> None:
    check_invariance(mode, small_path, random_prompts())


@pytest.mark.parametrize("mode", ["int8", "stored"])
def test_so_they_have_where_they_are_steered(mode: str, small_path: str) -> None:
    check_invariance(mode, small_path, random_prompts(), STEERED)


def random_prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [3, 600, *(round(3 * 200 ** rng.random()) for _ in range(30))]
    return [[rng.randrange(3, 199) for _ in range(length)] for length in lengths]
