"""Weights by transformers' names, whatever file they come from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from benchmarks.families.gguf_writer import write_gguf
from scheduler.models.files.checkpoint import (
    GgufCheckpoint,
    SafetensorsCheckpoint,
    StoredBlocks,
    Weight,
    gguf_file,
    open_checkpoint,
)
from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.files.gguf_split import GgufError
from tests.scheduler.test_families import tiny_model

STORABLE = {"hidden_size": 96, "intermediate_size": 128}
"""Sizes of whole blocks."""


def dequantized(weight: Weight) -> Tensor:
    """By the `gguf` package, whatever the kernels do."""
    if isinstance(weight, Tensor):
        return weight.float()
    return torch.from_numpy(gguf.quants.dequantize(weight.data.numpy(), GGMLQuantizationType[weight.type]))


def test_the_default_model_has_the_weights_that_transformers_reads(model_path: str, float32_path: str) -> None:
    ours, theirs = open_checkpoint(model_path), open_checkpoint(float32_path)
    assert isinstance(ours, GgufCheckpoint)
    assert isinstance(theirs, SafetensorsCheckpoint)
    assert ours.is_quantized
    assert "lm_head.weight" not in ours, "it is the embedding"
    names = [name for name in theirs.names if name != "lm_head.weight"]
    assert len(names) == 272
    for name in names:
        assert torch.equal(dequantized(ours.weight(name)), theirs.weight(name)), name


def test_what_stays_in_the_file_is_what_is_read(model_path: str) -> None:
    checkpoint = open_checkpoint(model_path)
    assert checkpoint is not None
    table, read = (ask("model.embed_tokens.weight") for ask in (checkpoint.table, checkpoint.weight))
    assert isinstance(table, StoredBlocks)
    assert isinstance(read, StoredBlocks)
    assert table.type == read.type == "Q8_0"
    assert torch.equal(table.data, read.data)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_familys_file_has_its_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **STORABLE)
    torch.nn.init.normal_(model.model.layers[0].input_layernorm.weight)
    write_gguf(model, tmp_path / "model.gguf", {"": "F16", "token_embd.weight": "BF16"})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint is not None
    assert not checkpoint.is_quantized
    state = model.state_dict()
    for name, expected in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        torch.testing.assert_close(dequantized(checkpoint.weight(name)), expected, atol=2e-6, rtol=5e-3)
    assert "model.layers.99.mlp.up_proj.weight" not in checkpoint


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_come_as_they_are(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **STORABLE)
    write_gguf(model, tmp_path / "model.gguf", {"": kind})
    checkpoint = GgufCheckpoint(GgufFile(tmp_path / "model.gguf"))
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        weight = checkpoint.weight(name)
        assert isinstance(weight, StoredBlocks)
        quantized = gguf.quants.quantize(model.state_dict()[name].numpy(), GGMLQuantizationType[kind])
        assert np.array_equal(weight.data.numpy(), quantized), "nothing was rounded again"


def test_the_parts_that_an_index_names(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(str(tmp_path))
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    for name, expected in model.state_dict().items():
        assert torch.equal(checkpoint.weight(name), expected)


def test_safetensors_come_before_a_gguf_file(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert gguf_file(str(tmp_path)) is None
    assert isinstance(open_checkpoint(str(tmp_path)), SafetensorsCheckpoint)


@pytest.mark.parametrize(
    ("size", "message"), [(10, "too short"), (200, "damaged"), (2000, "damaged|cut off"), (-40, "cut off")]
)
def test_a_file_that_was_cut_off_is_refused(size: int, message: str, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama", **STORABLE), tmp_path / "whole.gguf", {"": "Q8_0"})
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(GgufError, match=message):
        GgufFile(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"JUNK" + whole[4:])
    with pytest.raises(GgufError, match="no GGUF file"):
        GgufFile(tmp_path / "other.gguf")
