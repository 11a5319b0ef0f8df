"""What fewer bits cost, and what `auto` makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.families.gguf_writer import write_gguf
from scheduler.attention.native_backend import NativeAttention
from scheduler.config import EngineConfig
from scheduler.models.checks.quantization import TextLogprobs, choose_mode, kl_divergence, perplexity
from scheduler.models.loading import load
from scheduler.models.products import Mode
from scheduler.models.remembered import model_version
from tests.scheduler.test_families import tiny_model

TOKENS = [(7 * place * place + 3) % 190 + 3 for place in range(600)]


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    model = tiny_model("qwen2", hidden_size=96, intermediate_size=128)
    model.config.save_pretrained(folder)
    write_gguf(model, folder / "model.gguf", {"": "Q4_0", "token_embd.weight": "Q8_0"})
    return str(folder)


def logprobs(path: str, **knobs: str) -> TextLogprobs:
    loaded = load(EngineConfig(kv_cache_memory="1MB", **knobs), path)
    return TextLogprobs(loaded.model, NativeAttention(2), getattr(torch, loaded.info.kv_cache_dtype))


def test_a_files_own_codes_lose_only_the_rounding_of_the_rows(small_path: str) -> None:
    exact = logprobs(small_path, dtype="float32")
    assert kl_divergence(exact, exact, TOKENS) == 0.0
    stored = kl_divergence(exact, logprobs(small_path), TOKENS)
    again = kl_divergence(exact, logprobs(small_path, quantization="int4"), TOKENS)
    assert 0.0 < stored < again


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load(EngineConfig(kv_cache_memory="1MB", dtype="float32"), str(tmp_path))
    ours = perplexity(loaded.model, NativeAttention(2), TOKENS[:500], torch.float32)
    ids = torch.tensor([TOKENS[:500]])
    with torch.inference_mode():
        theirs = model(input_ids=ids, labels=ids).loss.exp().item()
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"f32": 10.0, "int4": 10.05}, "int4"),
        ({"f32": 10.0, "int4": 10.2, "int8": 10.05}, "int8"),
        ({"f32": 10.0, "int4": 10.2, "int8": 10.2}, "f32"),
    ],
)
def test_auto_takes_the_first_that_costs_little_and_remembers(
    measured: dict[Mode, float], chosen: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[Mode] = []

    def measure(mode: Mode) -> float:
        asked.append(mode)
        return measured[mode]

    assert choose_mode("model", "f32", measure) == chosen
    assert sorted(asked) == sorted(measured)
    assert choose_mode("model", "f32", measure) == chosen
    assert len(asked) == len(measured), "nothing was measured again"


def test_the_version_of_a_hub_model_is_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    versions = []
    for commit in ("0" * 40, "1" * 40, "0" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / commit / "config.json").touch()
        (repository / "refs" / "main").write_text(commit)
        versions.append(model_version("owner/name"))
    first, second, third = versions
    assert first == third != second
    assert model_version("owner/other") not in versions
