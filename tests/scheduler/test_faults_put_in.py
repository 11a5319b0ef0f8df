"""Faults that are put into the loader on purpose: each is found when a model is loaded, and the model refused or
run in another way. The checkpoint itself is as it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import tokenizers
import torch
from torch import Tensor

from benchmarks.families.gguf_writer import write_gguf
from scheduler.config import EngineConfig
from scheduler.kernels.library import Decoder, Kernels
from scheduler.kernels.native import kernels
from scheduler.models import model_config
from scheduler.models.files.checkpoint import GgufCheckpoint, SafetensorsCheckpoint
from scheduler.models.files.quantized_checkpoint import QuantizedCheckpoint
from scheduler.models.fused import fused_model, fused_weights
from scheduler.models.fused.fused_model import FusedModel
from scheduler.models.fused.outline import Outline, Rope
from scheduler.models.model_config import UnsupportedModelError
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import tiny_model
from tests.scheduler.test_quantized_checkpoint import FORMATS, Stored, write

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]

LAYER = "model.layers.1."
TOKENIZER = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 7}, unk_token="<end>")).to_str()
HEAD_NORMS = ("query_norm", "key_norm")


def reading(change: Callable[[Any, str], Tensor | None]) -> Fault:
    """A tensor read wrongly: `change` is given how to read and a name, and gives another tensor or None."""

    def put_in(patch: Patch) -> None:
        read: Any = SafetensorsCheckpoint.weight

        def wrongly(self: SafetensorsCheckpoint, name: str) -> Tensor:
            changed = change(lambda other: read(self, other), name)
            return read(self, name) if changed is None else changed

        patch.setattr(SafetensorsCheckpoint, "weight", wrongly)

    return put_in


def one(part: str, change: Callable[[Tensor], Tensor]) -> Fault:
    return reading(lambda read, name: change(read(name)) if name == LAYER + part else None)


def exchanged(first: str, second: str) -> Fault:
    other = {first: second, second: first}
    return reading(lambda read, name: read(other[name]) if name in other else None)


def halves_apart(weight: Tensor) -> Tensor:
    """The halves of each head (of 16) interleaved."""
    return weight.view(-1, 2, 8, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def heads_rolled(weight: Tensor) -> Tensor:
    return weight.roll(16, 0)


def decoder(**changes: Callable[[Any], Any]) -> Fault:
    """The native decoder made with another setting."""

    def put_in(patch: Patch) -> None:
        made = Kernels.decoder

        def wrong(self: Kernels, *parts: Any, **options: Any) -> Decoder:
            return made(self, *parts, **{k: changes.get(k, lambda v: v)(v) for k, v in options.items()})

        patch.setattr(Kernels, "decoder", wrong)

    return put_in


def layers(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Fault:
    """Each layer packed, and then changed."""

    def put_in(patch: Patch) -> None:
        pack: Any = fused_weights.Packer.layer
        patch.setattr(fused_weights.Packer, "layer", lambda self, number: change(pack(self, number)))

    return put_in


def method(owner: type, name: str, wrong: Callable[..., Any]) -> Fault:
    """A method, whose own form `wrong` is given first."""
    right = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda self, *given: wrong(right, self, *given))


def ropes(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Fault:
    def put_in(patch: Patch) -> None:
        table = Rope.table
        patch.setattr(Rope, "table", lambda rope, positions: change(*table(rope, positions)))

    return put_in


def slower(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The slowest frequency by a factor of 2, which changes next to nothing but far into a context."""
    angle = torch.atan2(sin, cos)
    size = angle.shape[1] // 2
    place = torch.arange(len(angle)) * (10000.0 ** (-2 * (size - 1) / (2 * size)) / 2)
    angle[:, size - 1] = angle[:, 2 * size - 1] = place
    return angle.cos().contiguous(), angle.sin().contiguous()


def windows(patch: Patch, size: int) -> None:
    """Each layer with another window than it has."""
    add = Decoder.add_layer
    patch.setattr(Decoder, "add_layer", lambda self, **layer: add(self, **(layer | {"sliding_window": size})))


def doubled(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else 2 * bias


LLAMA: dict[str, Fault] = {
    "queries and keys exchanged": exchanged(f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight"),
    "gate and up exchanged": exchanged(f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"),
    "layers exchanged": exchanged(
        "model.layers.0.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight"
    ),
    "norms exchanged": exchanged(f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"),
    "norms of layers exchanged": exchanged("model.norm.weight", f"{LAYER}input_layernorm.weight"),
    "head and embedding exchanged": exchanged("lm_head.weight", "model.embed_tokens.weight"),
    "the head is the embedding": reading(
        lambda read, name: read("model.embed_tokens.weight") if name == "lm_head.weight" else None
    ),
    "the head's rows rolled": reading(
        lambda read, name: read(name).roll(1, 0) if name == "lm_head.weight" else None
    ),
    "the embedding's rows rolled": method(
        SafetensorsCheckpoint, "table", lambda right, self, name: right(self, name).roll(1, 0)
    ),
    "the embedding scaled": method(
        SafetensorsCheckpoint, "table", lambda right, self, name: right(self, name) * 1.5
    ),
    "a square matrix transposed": one("self_attn.o_proj.weight", lambda weight: weight.mT.contiguous()),
    "a matrix scaled by 1.02": one("mlp.down_proj.weight", lambda weight: weight * 1.02),
    "a matrix dropped": one("self_attn.o_proj.weight", torch.zeros_like),
    "a sign": one("self_attn.v_proj.weight", lambda weight: -weight),
    "rows rolled": one("mlp.up_proj.weight", lambda weight: weight.roll(1, 0)),
    "columns rolled": one("mlp.down_proj.weight", lambda weight: weight.roll(1, 1)),
    "halves of heads interleaved": one("self_attn.k_proj.weight", halves_apart),
    "heads rolled": one("self_attn.q_proj.weight", heads_rolled),
    "one row zero": one("mlp.gate_proj.weight", lambda weight: weight.index_fill(0, torch.tensor([3]), 0)),
    "rounded to 8 bits": one("self_attn.q_proj.weight", lambda weight: (weight * 8).round() / 8),
    "a norm of ones": one("input_layernorm.weight", torch.ones_like),
    "a norm's offset": method(fused_weights.Packer, "_norm", lambda right, self, name: right(self, name) + 1),
    "the epsilon": decoder(norm_epsilon=lambda value: 1e-2),
    "the scale of attention": decoder(attention_scale=lambda value: value * 1.1),
    "a soft cap of attention": decoder(attention_softcap=lambda value: 5.0),
    "a soft cap of logits": decoder(logit_softcap=lambda value: 5.0),
    "the scale of embeddings": decoder(embedding_multiplier=lambda value: 48**0.5),
    "the activation": decoder(activation=lambda value: "gelu_tanh"),
    "a window": lambda patch: windows(patch, 4),
    "a slow frequency": ropes(slower),
    "positions backwards": ropes(lambda cos, sin: (cos, -sin)),
    "an end": lambda patch: patch.setattr(model_config, "tokenizers_end", lambda folder: None),
}


OTHERS: dict[str, tuple[str, Fault]] = {
    "biases ignored": ("qwen2", method(fused_weights.Packer, "_bias", lambda right, self, parts: None)),
    "biases doubled": (
        "qwen2",
        method(fused_weights.Packer, "_bias", lambda right, self, parts: doubled(right(self, parts))),
    ),
    "norms of queries and keys exchanged": (
        "qwen3",
        layers(lambda layer: layer | {"query_norm": layer["key_norm"], "key_norm": layer["query_norm"]}),
    ),
    "no norms of queries and keys": (
        "qwen3",
        layers(lambda layer: {name: part for name, part in layer.items() if name not in HEAD_NORMS}),
    ),
    "no offset of norms": (
        "gemma2",
        method(fused_weights.Packer, "_norm", lambda right, self, name: right(self, name) - 1),
    ),
    "no scale of embeddings": ("gemma2", decoder(embedding_multiplier=lambda value: 1.0)),
    "no soft cap of attention": ("gemma2", decoder(attention_softcap=lambda value: 0.0)),
    "no soft cap of logits": ("gemma2", decoder(logit_softcap=lambda value: 0.0)),
    "no window": ("gemma2", lambda patch: windows(patch, 0)),
    "one rotary embedding for all layers": (
        "gemma3_text",
        lambda patch: patch.setattr(fused_model, "rope_kind", lambda config, layer: config.layer_types[0]),
    ),
    "norms after and before exchanged": (
        "gemma2",
        layers(
            lambda layer: (
                layer
                | {
                    "post_attention_norm": layer["post_feed_forward_norm"],
                    "post_feed_forward_norm": layer["post_attention_norm"],
                }
            )
        ),
    ),
}


@pytest.fixture
def nothing_remembered(tmp_path: Path, monkeypatch: Patch) -> None:
    kernels()  # which are in that folder too
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)


def varied(family: str) -> Any:
    """A model whose norms and biases are not all alike."""
    model = tiny_model(family, hidden_size=96, num_attention_heads=6, **MORE.get(family, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 20, "num_hidden_layers": 6, "sliding_window_pattern": 3},
}

MODES = ("none", pytest.param("int4", marks=pytest.mark.prove))


def found(model: Any, folder: Path, **knobs: Any) -> None:
    """It is refused, or gives what it should."""
    prompts = [[5, 6, 7], [9 + place % 90 for place in range(60)]]
    config = EngineConfig(**{"dtype": "float32", "kv_cache_memory": "8MB", **knobs})
    try:
        core = EngineCore(config, str(folder))
    except UnsupportedModelError:
        return
    assert not isinstance(core.model, FusedModel), "it was not noticed"
    if config.quantization == "none":
        run = run_all(core, prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        assert count_ties(run.tokens, [reference(model, prompt, 12) for prompt in prompts]) == 0


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize("quantization", MODES)
@pytest.mark.parametrize("name", LLAMA)
def test_in_llama(name: str, quantization: str, tmp_path: Path, monkeypatch: Patch) -> None:
    model = varied("llama")
    model.save_pretrained(tmp_path)
    end = {"eos_token": "<end>", "added_tokens_decoder": {"7": {"content": "<end>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(end))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    LLAMA[name](monkeypatch)
    found(model, tmp_path, quantization=quantization)


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize("quantization", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_in_other_families(name: str, quantization: str, tmp_path: Path, monkeypatch: Patch) -> None:
    family, put_in = OTHERS[name]
    model = varied(family)
    model.save_pretrained(tmp_path)
    put_in(monkeypatch)
    found(model, tmp_path, quantization=quantization)


IN_GGUF: dict[str, tuple[str, Fault]] = {
    "halves of heads": ("llama", method(GgufCheckpoint, "_in_order", lambda right, self, stored, rows: rows)),
    "an offset of norms": (
        "gemma2",
        method(
            GgufCheckpoint,
            "weight",
            lambda right, self, name: right(self, name) + 1 if "norm" in name else right(self, name),
        ),
    ),
    "blocks of another type": (
        "llama",
        method(GgufCheckpoint, "weight", lambda right, self, name: misread(right(self, name))),
    ),
    "factors of positions": (
        "llama",
        lambda patch: patch.setattr(Outline, "slowed", lambda outline, factors: outline),
    ),
}


def misread(weight: Any) -> Any:
    if not isinstance(weight, Tensor) and weight.type == "Q4_1":
        return type(weight)(weight.data.roll(1, 0), weight.type)
    return weight


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize("name", IN_GGUF)
def test_in_gguf_files(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    family, put_in = IN_GGUF[name]
    slow = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    slow |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model(
        family, hidden_size=96, intermediate_size=128, **({"rope_parameters": slow} if family == "llama" else {})
    )
    write_gguf(model, tmp_path / "model.gguf", {"": "Q4_1"})
    if family == "llama":
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model.config.save_pretrained(tmp_path)
    put_in(monkeypatch)
    for quantization in ("none", "auto"):
        try:
            core = EngineCore(
                EngineConfig(dtype="float32", kv_cache_memory="8MB", quantization=quantization), str(tmp_path)
            )
        except UnsupportedModelError:
            continue
        assert not isinstance(core.model, FusedModel), "it was not noticed"


def raw(change: Callable[[str, Tensor], Tensor]) -> Fault:
    """A stored tensor of a quantized checkpoint read wrongly."""
    return method(QuantizedCheckpoint, "_raw", lambda right, self, name: change(name, right(self, name)))


QUANTIZED: dict[str, tuple[str, Fault]] = {
    "zeros one too small": ("gptq", lambda patch: settings(patch, checkpoint_format="gptq_v2")),
    "zeros ignored": ("awq", raw(lambda name, part: part * 0 if name.endswith("qzeros") else part)),
    "groups of another size": ("awq", lambda patch: settings(patch, group_size=64)),
    "another order of words": (
        "awq",
        lambda patch: patch.setattr("scheduler.models.files.quantized_checkpoint.AWQ_ORDER", tuple(range(8))),
    ),
    "scales rolled": ("gptq", raw(lambda name, part: part.roll(1, 0) if name.endswith("scales") else part)),
    "factors of blocks in reverse": (
        "fp8",
        raw(lambda name, part: part.flip(0) if name.endswith("scale_inv") else part),
    ),
    "factors that divide": ("fbgemm_fp8", raw(lambda name, part: 1 / part if name.endswith("scale") else part)),
    "factors of one row": (
        "compressed-tensors-8",
        raw(lambda name, part: part[:1].expand_as(part) if name.endswith("scale") else part),
    ),
    "half the range": (
        "compressed-tensors-4",
        raw(lambda name, part: part + 0x11111111 if name.endswith("packed") else part),
    ),
    "nested factors rolled": (
        "bitsandbytes",
        raw(lambda name, part: part.roll(1) if name.endswith("nested_quant_map") else part),
    ),
}


def settings(patch: Patch, **changes: Any) -> None:
    begin: Any = QuantizedCheckpoint.__init__
    patch.setattr(
        QuantizedCheckpoint, "__init__", lambda self, stored, config: begin(self, stored, {**config, **changes})
    )


@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_in_quantized_checkpoints(name: str, fused: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    form, put_in = QUANTIZED[name]
    pack, quantization = FORMATS[form]
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    stored: Stored = {}
    for key, weight in model.state_dict().items():
        parts, _ = pack(weight) if "proj" in key else ({"": weight}, weight)
        stem = key.removesuffix("weight") if "proj" in key else key
        stored |= {f"{stem}{end}": part for end, part in parts.items()}
    write(model, tmp_path, stored, quantization)
    put_in(monkeypatch)
    with pytest.raises(UnsupportedModelError):
        EngineCore(EngineConfig(dtype="float32", kv_cache_memory="8MB", fused=fused), str(tmp_path))
