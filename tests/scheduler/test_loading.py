"""What runs a model: the fast path where it can, the general one elsewhere, and a reason wherever it matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.families.gguf_writer import write_gguf
from scheduler.attention import BackendError
from scheduler.config import EngineConfig
from scheduler.kernels.native import kernels
from scheduler.models import opening, sources
from scheduler.models.files.checkpoint import SafetensorsCheckpoint, open_checkpoint
from scheduler.models.fused.fused_model import FusedModel
from scheduler.models.fused.fused_weights import DecoderWeights, pack_weights
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.modules.packed_linear import PackedLinear
from scheduler.models.modules.paged_model import PagedModel
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_checkpoint import dequantized
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


def products(path: str, **knobs: str) -> tuple[str, str]:
    """What was chosen: the arithmetic of the products, and the type of the KV cache."""
    info = EngineCore(EngineConfig(kv_cache_memory="64MB", **knobs), path).info
    return info.products, info.kv_cache_dtype


def test_the_default_model_runs_in_its_own_codes_unless_a_type_is_given(
    model_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert products(model_path) == ("stored", "bfloat16")
    assert products(model_path, dtype="float32") == ("float32", "float32")
    assert products(model_path, dtype="float32", kv_cache_dtype="bfloat16") == ("float32", "bfloat16")
    assert products(model_path, dtype="bfloat16") == ("bfloat16", "bfloat16")
    assert products(model_path, dtype="float32", quantization="int8") == ("int8", "bfloat16")
    assert products(model_path, quantization="int4") == ("int4", "bfloat16")
    assert "not fused" not in caplog.text, "rounding is not taken for a fault"


@pytest.mark.prove
def test_the_default_model_without_its_own_codes_is_measured(
    float32_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 costs it little, int4 more."""
    perplexities = iter([24.9, 23.7, 23.8])
    monkeypatch.setattr(opening, "perplexity", lambda *_: next(perplexities))
    kernels()  # which are in that folder too
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert products(float32_path)[0] == "int8"


def test_codes_that_are_not_there_are_not_taken(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="--quantization stored: it is for GGUF files"):
        EngineCore(EngineConfig(quantization="stored"), str(tmp_path))


def test_what_a_checkpoint_lacks_is_said(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    model.config.vocab_size = 300
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="logits for 199 tokens, not 300"):
        EngineCore(EngineConfig(dtype="float32"), str(tmp_path))


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=0)
PROMPTS = [[5, 6, 7], [9 + place % 90 for place in range(100)], [11] * 33]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_gguf_file_and_its_weights_in_safetensors_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, hidden_size=96, intermediate_size=128)
    folders = [tmp_path / "gguf", tmp_path / "safetensors"]
    for folder in folders:
        model.config.save_pretrained(folder)
    write_gguf(model, folders[0] / "model.gguf", {"": "Q5_0", "attn_v.weight": "Q8_0", "ffn_up.weight": "Q4_1"})
    checkpoint = open_checkpoint(str(folders[0]))
    assert checkpoint is not None
    state = model.state_dict()
    model.load_state_dict(
        {name: dequantized(checkpoint.weight(name)) for name in state if name in checkpoint}, strict=False
    )
    model.save_pretrained(folders[1])
    expected = [reference(model, prompt, 24).tokens for prompt in PROMPTS]
    for folder in folders:
        for fused in (True, False):
            core = EngineCore(EngineConfig(dtype="float32", fused=fused), str(folder))
            assert isinstance(core.model, FusedModel) == fused
            assert run_all(core, PROMPTS, GREEDY).tokens == expected
    # A gate and what it gates that are stored in different ways are no product for codes; the rest is.
    core = EngineCore(EngineConfig(), str(folders[0]))
    assert core.info.products == "stored"
    run_all(core, PROMPTS, GREEDY)


def test_a_gguf_file_says_how_much_slower_positions_turn(tmp_path: Path) -> None:
    """Llama 3.1's files have factors of the rotary embedding's frequencies, which transformers does not read."""
    slow = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    slow |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model("llama", hidden_size=96, intermediate_size=128, rope_parameters=slow)
    expected = [reference(model, prompt, 24).tokens for prompt in PROMPTS]
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"})
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model.config.save_pretrained(tmp_path)
    for fused in (True, False):
        core = EngineCore(EngineConfig(dtype="float32", fused=fused), str(tmp_path))
        assert run_all(core, PROMPTS, GREEDY).tokens == expected


@pytest.mark.prove
def test_without_a_compiler_and_without_a_home_it_warns_once_and_runs_on_torch(model_path: str) -> None:
    program = (
        "from scheduler import LLM, SamplingParams\n"
        f"llm = LLM({model_path!r}, dtype='float32', kv_cache_memory='64MB')\n"
        "params = SamplingParams(temperature=0, max_tokens=1)\n"
        "print(llm.engine.info.attention_backend, llm.generate(['The capital of France is'], params)[0].text)"
    )
    # Not even root can write there.
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME"), "/proc/nowhere")
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **nowhere, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.strip() == "torch  Paris"
    (warning,) = [line for line in result.stderr.splitlines() if "falls back" in line]
    assert "need a C++ compiler, and 'no-such-compiler' is not on the PATH" in warning
    assert "cannot write the cache folder /proc/nowhere" in result.stderr


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for fused in (True, False):
        with pytest.raises(UnsupportedModelError, match="its weights are a pickle"):
            EngineCore(EngineConfig(dtype="float32", fused=fused), str(tmp_path))


def test_code_in_a_models_folder_is_not_run(tmp_path: Path) -> None:
    config = {
        "model_type": "strange",
        "architectures": ["Strange"],
        "auto_map": {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.Strange"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass StrangeConfig: pass\n")
    with pytest.raises(UnsupportedModelError, match="code from a model's folder is never run"):
        EngineCore(EngineConfig(dtype="float32"), str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_the_native_decoder_does_not_know_is_not_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here what a later version of transformers may do to a family: the small copy shows it."""
    tiny_model("llama").save_pretrained(tmp_path)
    kernels()  # which are in that folder too
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    forward: Any = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.1 * forward(self, x))
    core = EngineCore(EngineConfig(dtype="float32", kv_cache_memory="4MB"), str(tmp_path))
    assert isinstance(core.model, PagedModel)
    assert "not fused: the native decoder: the logits differ by" in caplog.text


def test_weights_that_are_packed_wrongly_are_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here with those of two layers mistaken for each other: no small copy shows it."""
    tiny_model("llama").save_pretrained(tmp_path)
    read: Any = SafetensorsCheckpoint.weight
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    exchanged = {first: second, second: first}

    def mistaken(config: Any, checkpoint: Any, *arguments: Any) -> DecoderWeights:
        with monkeypatch.context() as patched:
            patched.setattr(
                SafetensorsCheckpoint, "weight", lambda self, name: read(self, exchanged.get(name, name))
            )
            return pack_weights(config, checkpoint, *arguments)

    monkeypatch.setattr(sources, "pack_weights", mistaken)
    core = EngineCore(EngineConfig(dtype="float32", kv_cache_memory="4MB"), str(tmp_path))
    assert isinstance(core.model, PagedModel)
    assert "not fused: layer 0, packed for f32 products, differs by" in caplog.text


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_products_that_are_wrong_are_refused(
    quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("olmo2").save_pretrained(tmp_path)
    product: Any = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: product(self, x.roll(1, dims=-1)))
    config = EngineConfig(dtype="float32", kv_cache_memory="4MB", quantization=quantization)
    with pytest.raises(UnsupportedModelError, match="the logits differ by") as refused:
        EngineCore(config, str(tmp_path))
    assert ("--quantization none" in str(refused.value)) == (quantization == "int4")


def test_positions_that_change_with_the_length_end_where_they_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0}
    model = tiny_model("llama", max_position_embeddings=256, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    core = EngineCore(EngineConfig(dtype="float32", kv_cache_memory="4MB"), str(tmp_path))
    assert core.info.max_model_len == 64
    assert "sequences end at 64 tokens, and not at 256" in caplog.text
