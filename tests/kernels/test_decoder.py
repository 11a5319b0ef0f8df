"""The native decoder against Transformers: the same logits, for each family, in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from scheduler.models.checks.fused_probe import outline_of
from scheduler.models.files.checkpoint import ModuleCheckpoint
from scheduler.models.fused.fused_model import can_fuse, make_decoder
from scheduler.models.fused.fused_weights import pack_weights
from scheduler.models.modules.paged_model import PagedModel
from scheduler.models.products import Mode
from tests.scheduler.test_families import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 130,
    "max_position_embeddings": 1024,
    "attn_implementation": "eager",
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=20),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-sliding": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=20, query_pre_attn_scalar=24),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=20, sliding_window_pattern=2, query_pre_attn_scalar=24),
}


def random_model(config: Any) -> Any:
    """A model whose every weight matters: nothing left at 0 or 1, and logits of some size."""
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
        parameter.data.normal_(centre, 0.12)
    return model


@dataclass
class Engine:
    """The least that can serve a decoder: a pool of blocks, and the tokens of some sequences."""

    decoder: Any
    config: Any
    dtype: torch.dtype = torch.float32
    num_blocks: int = 80
    threads: int = 2
    sequences: dict[int, list[int]] = field(default_factory=dict)  # tokens in the cache
    blocks: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        layers = self.config.num_hidden_layers
        keys = torch.full((layers, self.num_blocks, heads, head_dim, 16), torch.nan, dtype=self.dtype)
        self.decoder.bind_cache(list(keys), list(keys.transpose(-1, -2).contiguous()), [0] * layers)
        self.free = torch.randperm(self.num_blocks).tolist()

    def step(self, chunks: dict[int, list[int]], every_row: bool = False) -> Tensor:
        """Adds tokens to sequences; gives the logits after each sequence's last token, or after every token."""
        for name, tokens in chunks.items():
            sequence = self.sequences.setdefault(name, [])
            sequence += tokens
            owned = self.blocks.setdefault(name, [])
            while len(owned) * 16 < len(sequence):
                owned.append(self.free.pop())
        tables = torch.full((len(chunks), max(len(self.blocks[n]) for n in chunks)), -1, dtype=torch.int32)
        for row, name in enumerate(chunks):
            tables[row, : len(self.blocks[name])] = torch.tensor(self.blocks[name])
        start = torch.tensor([0, *map(len, chunks.values())]).cumsum(0).int()
        packed = torch.tensor([token for chunk in chunks.values() for token in chunk], dtype=torch.int32)
        lens = torch.tensor([len(self.sequences[n]) for n in chunks], dtype=torch.int32)
        ends = [(len(self.sequences[name]), len(chunk)) for name, chunk in chunks.items()]
        positions = torch.cat([torch.arange(end - count, end) for end, count in ends])
        rows = torch.arange(len(packed), dtype=torch.int32) if every_row else start[1:] - 1
        logits, _ = self.decoder.forward(
            packed, positions, tables[None], start, lens, rows, rows[:0], num_threads=self.threads
        )
        return logits


def native_decoder(model: Any, mode: Mode, max_positions: int = 1024) -> Any:
    model.set_attn_implementation("carousel_paged")
    weights = pack_weights(model.config, ModuleCheckpoint(model), mode, "f32" if mode == "f32" else "bf16")
    outline = outline_of(PagedModel(model))
    decoder = make_decoder(model.config, outline, weights, outline.tables(max_positions))
    model.set_attn_implementation("eager")
    return decoder


def expected_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_transformers(family: Any) -> None:
    model = random_model(FAMILIES[family])
    prompts = [torch.randint(0, 130, (n,)).tolist() for n in (1, 300, 45)]
    engine = Engine(native_decoder(model, "f32"), model.config)
    logits = engine.step(dict(enumerate(prompts)), every_row=True).split([len(p) for p in prompts])
    for prompt, got in zip(prompts, logits, strict=True):
        torch.testing.assert_close(got, expected_logits(model, prompt), atol=2e-4, rtol=1e-4)
    more = engine.step({1: [5, 6, 7], 2: [9]})
    torch.testing.assert_close(more[0], expected_logits(model, [*prompts[1], 5, 6, 7])[-1], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(more[1], expected_logits(model, [*prompts[2], 9])[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["int4", "int8", "bf16", "f32"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_sequence_does_not_depend_on_its_company(family: Any, mode: Any) -> None:
    config = FAMILIES[family]
    decoder = native_decoder(random_model(config), mode)
    dtype = torch.float32 if mode == "f32" else torch.bfloat16
    prompt = torch.randint(0, 130, (400,)).tolist()

    alone = Engine(decoder, config, dtype, threads=1).step({0: prompt}, every_row=True)
    chunked, crowd = Engine(decoder, config, dtype), {1: prompt[:50], 2: prompt[7:20], 3: [1]}
    chunked.step(crowd)
    parts, at = [], 0
    for size in (1, 30, 170, 16, 183):
        together = {1: [3], 0: prompt[at : at + size], 3: [4, 5]}
        logits = chunked.step(together, every_row=True)
        parts.append(logits[1 : 1 + size])
        at += size
    assert torch.equal(alone, torch.cat(parts))


def test_modes_agree_roughly() -> None:
    config = FAMILIES["llama"]
    model = random_model(config)
    prompt = torch.randint(0, 130, (60,)).tolist()
    expected = expected_logits(model, prompt)
    modes: dict[Mode, float] = {"bf16": 0.9995, "int8": 0.99, "int4": 0.9}
    for mode, closeness in modes.items():
        logits = Engine(native_decoder(model, mode), config, torch.bfloat16).step({0: prompt}, every_row=True)
        assert torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > closeness


def test_wrong_steps_are_refused() -> None:
    config = FAMILIES["llama"]
    decoder = native_decoder(random_model(config), "f32", max_positions=40)
    one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="0 caches"):
        decoder.forward(zero, zero.long(), zero[None, None], torch.cat([zero, one]), one, zero, zero)
    with pytest.raises(ValueError, match="token id 130"):
        Engine(decoder, config).step({0: [1, 130]})
    with pytest.raises(ValueError, match="longer than the rope table of 40"):
        Engine(decoder, config).step({0: [1] * 41})
    engine = Engine(decoder, config)
    decoder.bind_cache([torch.zeros(4, 2, 16, 16)] * 4, [torch.zeros(4, 2, 16, 16)] * 4, [0] * 4)
    with pytest.raises(ValueError, match="the cache of layer 0 has the wrong shape"):
        engine.step({0: [1]})
    engine = Engine(decoder, config)
    keys = [torch.zeros(80, config.num_key_value_heads, config.head_dim, 16)] * 4
    decoder.bind_cache(keys, [key.transpose(-1, -2).contiguous() for key in keys], [0, 0, 1, 0])
    with pytest.raises(ValueError, match="layer 2 is of group 1, but there are block tables for 1"):
        engine.step({0: [1]})


def test_another_activation_is_left_to_the_general_path() -> None:
    model = random_model(LlamaConfig(**SIZES, hidden_act="relu"))
    model.set_attn_implementation("carousel_paged")
    assert not can_fuse(model.config, PagedModel(model).layers)


def test_the_default_model_in_float32(float32_path: str) -> None:
    real_model = AutoModelForCausalLM.from_pretrained(float32_path, dtype=torch.float32).eval()
    prompt = torch.randint(3, 40000, (150,)).tolist()
    engine = Engine(native_decoder(real_model, "f32", max_positions=512), real_model.config)
    logits = engine.step({0: prompt}, every_row=True)
    assert (logits - expected_logits(real_model, prompt)).abs().max() < 1e-3

    expected = real_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, min_new_tokens=16)[
        0
    ]
    tokens = list(prompt)
    for _ in range(16):
        tokens.append(int(logits[-1].argmax()))
        logits = engine.step({0: tokens[-1:]})
    assert tokens[-16:] == expected[-16:].tolist()


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "gemma3_text"])
def test_its_positions_turn_by_the_bits_of_transformers(kind: str) -> None:
    scaled = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    family = "gemma3_text" if kind == "gemma3_text" else "llama"
    scaling = {} if family == "gemma3_text" else {"rope_parameters": scaled}
    model = tiny_model(family, max_position_embeddings=256, **scaling)
    model.set_attn_implementation("carousel_paged")
    tables = outline_of(PagedModel(model)).tables(256)
    assert tables
    for name, (cos, sin) in tables.items():
        theirs = model.model.rotary_emb(torch.empty(0), torch.arange(256)[None], *([] if name is None else [name]))
        assert torch.equal(cos, theirs[0][0])
        assert torch.equal(sin, theirs[1][0])
