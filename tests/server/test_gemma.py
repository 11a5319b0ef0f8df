"""Gemma 3 as people have it: in a GGUF file, in float16, and in a checkpoint that also reads images. Tiny models
with random weights, over HTTP."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.families.gguf_writer import write_gguf
from scheduler.models.checks.small_copy import randomize, small_copy
from scheduler.models.files.checkpoint import open_checkpoint
from tests.conftest import count_ties, reference
from tests.scheduler.test_checkpoint import dequantized
from tests.scheduler.test_families import tiny_model
from tests.server.serving import Server

NUM_TOKENS = 12
RNG = random.Random(3)
PROMPTS = [[RNG.randrange(3, 49_000) for _ in range(RNG.randrange(1, 90))] for _ in range(24)]


def text_model(vocab_size: int) -> PreTrainedModel:
    changes: dict[str, Any] = {"sliding_window": 20, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3}
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": vocab_size}
    return tiny_model("gemma3_text", **changes, **sizes)


def in_gguf(folder: Path, vocab_size: int) -> PreTrainedModel:
    """Its matrices in four and eight bits; returned is what these stand for."""
    model = text_model(vocab_size)
    model.config.save_pretrained(folder)
    write_gguf(model, folder / "model.gguf", {"": "Q4_0", "attn_v.weight": "Q8_0"})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint is not None
    weights = {name: dequantized(checkpoint.weight(name)) for name in model.state_dict() if name in checkpoint}
    model.load_state_dict(weights, strict=False)
    return model


def in_float16(folder: Path, vocab_size: int) -> PreTrainedModel:
    model = text_model(vocab_size)
    half: Any = copy.deepcopy(model)
    half.half().save_pretrained(folder)
    model.load_state_dict(half.state_dict())
    return model


def with_images(folder: Path, vocab_size: int) -> PreTrainedModel:
    config = small_copy(AutoConfig.for_model("gemma3"), vocab_size=vocab_size)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [in_gguf, pytest.param(in_float16, marks=pytest.mark.prove), with_images])
async def test_it_says_what_transformers_says(
    make: Callable[[Path, int], PreTrainedModel], model_path: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # that of another model: the prompts are numbers
        shutil.copy(Path(model_path) / name, folder)
    model = make(folder, 49_152)
    with Server(tmp_path / "log", "--model", str(folder), "--dtype", "float32") as server:
        body = {"prompt": PROMPTS, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        status, answer = await server.post("/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, answer
        assert "one after the other" not in server.log
    tokens = [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    assert count_ties(tokens, [reference(model, prompt, NUM_TOKENS) for prompt in PROMPTS]) == 0
