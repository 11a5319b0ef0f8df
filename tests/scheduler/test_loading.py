"""What runs a model: the fast path where it can, the general one elsewhere, and a reason wherever it matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.attention import BackendError
from scheduler.config import EngineConfig
from scheduler.engine import EngineCore
from scheduler.fused_model import FusedModel
from scheduler.model import PagedModel
from scheduler.model_config import UnsupportedModelError
from tests.scheduler.test_families import tiny_model


def test_the_llama_family_is_fused_and_others_are_not(tmp_path: Path) -> None:
    for family in ("llama", "olmo2"):
        tiny_model(family).save_pretrained(tmp_path / family)
    assert isinstance(EngineCore(EngineConfig(dtype="float32"), str(tmp_path / "llama")).model, FusedModel)
    assert isinstance(EngineCore(EngineConfig(dtype="float32"), str(tmp_path / "olmo2")).model, PagedModel)
    plain = EngineCore(EngineConfig(dtype="float32", fused=False), str(tmp_path / "llama"))
    assert isinstance(plain.model, PagedModel)


def test_what_was_asked_for_by_name_and_cannot_be_is_refused(tmp_path: Path) -> None:
    tiny_model("gpt_neox", num_key_value_heads=6).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="int8: the native products take float32 and bfloat16, not float16"
    ):
        EngineCore(EngineConfig(quantization="int8", dtype="float16"), str(tmp_path))
    with pytest.raises(BackendError, match="a multiple of 16"):
        EngineCore(EngineConfig(attention_backend="native", dtype="float32"), str(tmp_path))
    with pytest.raises(BackendError, match="--block-size must be a multiple of 16"):
        EngineCore(EngineConfig(attention_backend="native", block_size=8, dtype="float32"), str(tmp_path))


def test_int8_is_taken_for_the_default_model_because_it_costs_little(model_path: str) -> None:
    core = EngineCore(EngineConfig(dtype="bfloat16", kv_cache_memory="64MB"), model_path)
    assert core.info.products == "int8"
    assert core.info.dtype == "bfloat16"


def test_without_a_compiler_it_warns_once_and_runs_on_torch(model_path: str) -> None:
    program = (
        "from scheduler import LLM, SamplingParams\n"
        f"llm = LLM({model_path!r}, dtype='float32', kv_cache_memory='64MB')\n"
        "params = SamplingParams(temperature=0, max_tokens=1)\n"
        "print(llm.engine.info.attention_backend, llm.generate(['The capital of France is'], params)[0].text)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.strip() == "torch  Paris"
    (warning,) = [line for line in result.stderr.splitlines() if "falls back" in line]
    assert "need a C++ compiler, and 'no-such-compiler' is not on the PATH" in warning
