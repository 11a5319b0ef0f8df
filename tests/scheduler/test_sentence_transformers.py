"""Models for embeddings as sentence-transformers writes them give the vectors that it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from scheduler import LLM, SamplingParams
from scheduler.core.request import InvalidRequestError
from scheduler.models.files.embedding_layout import embedding_layout
from tests.scheduler.sentencepiece_like import write_tokenizer
from tests.scheduler.test_families import tiny_model

TEXTS = ["Alice was beginning to get very tired", "A cat", "Down, down. Would the fall never come to an end?"]


def write(folder: Path, family: str, pooling: str, *, dense: bool = False, tied: bool = True) -> None:
    whole = folder.with_name(folder.name + "-whole")
    tiny_model(family, vocab_size=1000, tie_word_embeddings=tied).save_pretrained(whole)
    write_tokenizer(whole)
    parts: list[Any] = [Transformer(str(whole)), Pooling(48, pooling)]
    if dense:
        torch.manual_seed(0)
        parts.append(Dense(48, 20))
    SentenceTransformer(modules=[*parts, Normalize()], device="cpu").save(str(folder))


@pytest.mark.parametrize(
    ("family", "pooling", "dense", "tied"),
    [
        ("qwen3", "lasttoken", False, True),  # Qwen3-Embedding
        ("qwen2", "lasttoken", False, False),  # gte-Qwen2
        ("llama", "mean", False, True),
        ("llama", "mean", True, True),  # EmbeddingGemma has such layers
    ],
)
def test_vectors_are_theirs(family: str, pooling: str, dense: bool, tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, family, pooling, dense=dense, tied=tied)
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = np.stack([theirs.encode(text) for text in TEXTS])
    llm = LLM(str(folder), dtype="float32", kv_cache_memory="8MB")
    found = llm.embed(TEXTS, progress=False)
    assert found.shape == (len(TEXTS), 20 if dense else 48)
    assert np.abs(found - expected).max() < 1e-4
    if not tied:  # it was saved without a head, and there is none to take in its place
        with pytest.raises(InvalidRequestError, match="it makes embeddings, and no text"):
            llm.generate(["A cat"], SamplingParams(max_tokens=1), progress=False)


def test_what_is_not_done_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", "mean", dense=True)
    folder = tmp_path / "model"
    assert embedding_layout(folder).pooling == "mean"
    config = folder / "2_Dense" / "config.json"
    known = json.loads(config.read_text())
    for change in ({"activation_function": "torch.nn.modules.activation.ReLU"}, {"use_residual": True}):
        config.write_text(json.dumps(known | change))
        assert embedding_layout(folder).pooling is None
    config.write_text(json.dumps(known))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "a.LayerNorm", "path": "4_LayerNorm"}]))
    assert embedding_layout(folder).pooling is None


def test_poolings_as_they_were_and_are_written(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    for config, expected in (
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": ["mean", "cls"]}, None),
        ({"pooling_mode": "cls"}, None),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
        assert embedding_layout(tmp_path).pooling == expected
