"""What may be wrong with a model's files is said in one sentence, and what is not wrong starts."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scheduler.client.async_engine import AsyncEngine, EngineStartError
from scheduler.client.handle import EngineProcess
from scheduler.config import EngineConfig
from scheduler.models.files.model_source import ModelNotFoundError, resolve_model
from scheduler.models.model_config import UnsupportedModelError
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer, TokenizerError
from scheduler.wire.messages import Launch
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import tiny_model

PROMPTS = [[3 + (5 * place + number) % 150 for place in range(9 + 17 * number)] for number in range(3)]
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def start(folder: Path, **knobs: Any) -> EngineCore:
    return EngineCore(EngineConfig(dtype="float32", kv_cache_memory="16MB", **knobs), str(folder))


def change(folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


@FUSED
def test_weights_that_are_missing_are_named(folder: Path, fused: bool) -> None:
    change(folder, lambda state: {name: weight for name, weight in state.items() if ".layers.1." not in name})
    with pytest.raises(UnsupportedModelError, match=r"lacks model.layers.1.input_layernorm.weight, .* and 6 more"):
        start(folder, fused=fused)


@FUSED
def test_weights_that_nobody_needs_are_named(folder: Path, fused: bool) -> None:
    more = "model.layers.9.mlp.up_proj.weight"
    change(folder, lambda state: {**state, more: state["model.layers.1.mlp.up_proj.weight"].clone()})
    with pytest.raises(UnsupportedModelError, match=f"has, unlike this model, {more}"):
        start(folder, fused=fused)


@FUSED
def test_what_old_checkpoints_have_besides_is_no_matter(folder: Path, fused: bool) -> None:
    more = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda state: {**state, more: state["model.norm.weight"].clone()})
    assert start(folder, fused=fused).info.num_blocks > 0


@FUSED
def test_a_file_that_is_cut_off_is_damaged(folder: Path, fused: bool) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200_000])
    with pytest.raises(UnsupportedModelError, match=r"damaged: it has 200,000 bytes|not fully covered"):
        start(folder, fused=fused)


@FUSED
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_float16_starts(tmp_path: Path, family: str, fused: bool) -> None:
    model = tiny_model(family).to(torch.float16)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    run = run_all(
        start(tmp_path, fused=fused), PROMPTS, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    )
    assert count_ties(run.tokens, [reference(model.float(), prompt, 16) for prompt in PROMPTS]) == 0


def test_an_adapter_beside_the_model_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        start(folder)
    assert "an adapter beside the model" in caplog.text
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="has an adapter and no model: merge it"):
        resolve_model(str(folder))


def test_without_a_tokenizer(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer can be read from .*tokenizer.json"):
        Tokenizer(str(folder))
    with pytest.raises(OSError, match="no tokenizer can be read"):
        EngineCore(EngineConfig(), str(folder))  # it is needed to measure what int8 costs


def test_a_tokenizer_without_its_settings(folder: Path, model_path: str) -> None:
    shutil.copy(Path(model_path) / "tokenizer.json", folder)
    assert Tokenizer(str(folder)).encode("Once upon a time") == Tokenizer(model_path).encode("Once upon a time")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and a hub that is nowhere."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_that_is_nowhere_is_told_at_once(hub: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"not in the Hugging Face cache, and 127.0.0.1 cannot be rea"):
        resolve_model("some/model")


def test_what_the_hub_gave_once_is_taken_from_the_cache(hub: Path, folder: Path) -> None:
    snapshot = hub / "models--some--model" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("hub"))
    refs = hub / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    assert resolve_model("some/model") == str(snapshot)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="not in the Hugging Face cache"):
        resolve_model("some/model")


async def test_a_temporary_folder_with_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    process = await EngineProcess.start()
    await process.kill()
    process.close()


async def test_sockets_that_vanish_while_the_engine_loads_are_missed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = EngineProcess.launch

    def launch_and_tidy_up(process: EngineProcess, what: Launch) -> None:
        launch(process, what)
        shutil.rmtree(process.folder.name)

    monkeypatch.setattr(EngineProcess, "launch", launch_and_tidy_up)
    engine = AsyncEngine(EngineConfig(model=str(folder), kv_cache_memory="16MB"))
    with pytest.raises(EngineStartError, match="the folder of its sockets, vanished while it was starting"):
        await engine.start()
