"""Checkpoints that other programs have quantized, made by their formats' rules: what they say as floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from benchmarks.families.tiny import tiny_model as tiny_model_of
from scheduler.config import EngineConfig
from scheduler.models.model_config import UnsupportedModelError
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import tiny_model

Stored = dict[str, Tensor]
Pack = Callable[[Tensor], tuple[Stored, Tensor]]
"""From a matrix [N, K] to what is stored of it, by the ends of the names, and the matrix that this stands for."""

GROUP = 32
PROMPTS = [[3 + (5 * place + number) % 150 for place in range(9 + 17 * number)] for number in range(3)]


def word(numbers: list[int]) -> int:
    """Eight numbers of four bits in one of 32, with a sign as int32 has it."""
    bits = sum(number << (4 * place) for place, number in enumerate(numbers))
    return bits - (1 << 32) if bits >> 31 else bits


def in_words(rows: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbours of a row in each number."""
    return torch.tensor(
        [[word([row[start + place] for place in order]) for start in range(0, len(row), 8)] for row in rows],
        dtype=torch.int32,
    )


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers [N, K] and zeros [N, groups] from 0 to 15, scales [N, groups], and what they stand for."""
    blocks = weight.view(len(weight), -1, GROUP)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    numbers = (blocks / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    meant = ((numbers - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    return numbers.flatten(1).int(), zero.int(), scale, meant


def gptq(weight: Tensor) -> tuple[Stored, Tensor]:
    numbers, zero, scale, meant = grouped(weight)
    stored = {
        "qweight": in_words(numbers.tolist()).T.contiguous(),
        "qzeros": in_words((zero - 1).T.tolist()),
        "scales": scale.T.half().contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return stored, meant


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    numbers, zero, scale, meant = grouped(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": in_words(numbers.T.tolist(), order),
        "qzeros": in_words(zero.T.tolist(), order),
        "scales": scale.T.half().contiguous(),
    }
    return stored, meant


def packed(weight: Tensor) -> tuple[Stored, Tensor]:
    """compressed-tensors, 4 bits, with a zero for each group."""
    numbers, zero, scale, meant = grouped(weight)
    stored = {
        "weight_packed": in_words(numbers.tolist()),
        "weight_scale": scale,
        "weight_zero_point": in_words(zero.T.tolist()).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return stored, meant


def rows_of_integers(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [N, K] from 0 to 255, around 128, scales [N, groups], and what they stand for."""
    blocks = weight.view(len(weight), -1, GROUP)
    scale = (blocks.abs().amax(-1) / 127).half().float()
    numbers = (blocks / scale.unsqueeze(-1)).round().clamp(-128, 127)
    return (numbers + 128).flatten(1).int(), scale, (numbers * scale.unsqueeze(-1)).flatten(1)


def four_bytes(numbers: Tensor) -> Tensor:
    """Four neighbours of a row in each number."""
    return numbers.to(torch.uint8).contiguous().view(torch.int32)


def gptq_8(weight: Tensor) -> tuple[Stored, Tensor]:
    numbers, scale, meant = in_eight_bits(weight)
    stored = {
        "qweight": four_bytes(numbers).T.contiguous(),
        "qzeros": four_bytes(torch.full((scale.shape[1], len(weight)), 127)),
        "scales": scale.T.half().contiguous(),
    }
    return stored, meant


def packed_8(weight: Tensor) -> tuple[Stored, Tensor]:
    numbers, scale, meant = in_eight_bits(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": four_bytes(numbers), "weight_scale": scale, "weight_shape": shape}, meant


def rows_with_zeros(weight: Tensor) -> tuple[Stored, Tensor]:
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    numbers = (weight / scale + zero).round().clamp(-128, 127)
    stored = {"weight": numbers.to(torch.int8), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    return stored, (numbers - zero) * scale


def nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """Sixteen neighbours share a factor."""
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    blocks = weight.view(len(weight), -1, 16)
    whole = 448 * 6 / weight.abs().max()
    factors = (blocks.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    divided = blocks / (factors.float() / whole).unsqueeze(-1)
    codes = (divided.unsqueeze(-1) - values).abs().argmin(-1).flatten(1)
    stored = {
        "weight_packed": (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        "weight_scale": factors,
        "weight_global_scale": whole.reshape(1),
    }
    meant = values[codes].view(blocks.shape) * (factors.float() / whole).unsqueeze(-1)
    return stored, meant.view(weight.shape)


def bytes_of_rows(weight: Tensor) -> tuple[Stored, Tensor]:
    """bitsandbytes, LLM.int8()."""
    largest = weight.abs().amax(1)
    numbers = (weight / largest.unsqueeze(1) * 127).round()
    return {"weight": numbers.to(torch.int8), "SCB": largest}, numbers * largest.unsqueeze(1) / 127


def rows_of_floats(weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def blocks_of_floats(weight: Tensor) -> tuple[Stored, Tensor]:
    """16 rows and 32 columns share a factor."""
    scale = torch.empty(-(-weight.shape[0] // 16), -(-weight.shape[1] // 32))
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            place = (slice(16 * row, 16 * row + 16), slice(32 * column, 32 * column + 32))
            scale[row, column] = weight[place].abs().max() / 448
            numbers[place] = (weight[place] / scale[row, column]).to(torch.float8_e4m3fn)
            meant[place] = numbers[place].float() * scale[row, column]
    return {"weight": numbers, "weight_scale_inv": scale}, meant


def nf4(weight: Tensor) -> tuple[Stored, Tensor]:
    """bitsandbytes, whose factors are quantized as well."""
    levels = torch.linspace(-1, 1, 16) ** 3
    codes = torch.linspace(-1, 1, 256)
    flat = weight.flatten().view(-1, 64)
    factors = flat.abs().amax(1)
    offset = factors.mean().item()
    nested = (factors - offset).abs().max()
    chosen = ((factors - offset) / nested).unsqueeze(1).sub(codes).abs().argmin(1)
    meant_factors = codes[chosen] * nested + offset
    numbers = (flat / meant_factors.unsqueeze(1)).unsqueeze(-1).sub(levels).abs().argmin(-1).flatten()
    state = {
        **{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)},
        **{"nested_blocksize": 4096, "nested_dtype": "float32", "nested_offset": offset},
    }
    stored = {
        "weight": (numbers[0::2] * 16 + numbers[1::2]).to(torch.uint8).unsqueeze(1),
        "weight.absmax": chosen.to(torch.uint8),
        "weight.quant_map": levels,
        "weight.nested_absmax": nested.repeat(-(-len(factors) // 4096)),
        "weight.nested_quant_map": codes,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return stored, (levels[numbers].view(-1, 64) * meant_factors.unsqueeze(1)).view(weight.shape)


FORMATS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "compressed-tensors-4": (packed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "compressed-tensors-8": (rows_of_integers, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "gptq-8": (gptq_8, {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "compressed-tensors-8-packed": (
        packed_8,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": GROUP}}}},
    ),
    "compressed-tensors-8-zeros": (
        rows_with_zeros,
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
    ),
    "nvfp4": (nvfp4, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "bitsandbytes-8": (bytes_of_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fbgemm_fp8": (rows_of_floats, {"quant_method": "fbgemm_fp8"}),
    "fp8": (blocks_of_floats, {"quant_method": "fp8", "weight_block_size": [16, 32]}),
    "bitsandbytes": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def write(model: PreTrainedModel, folder: Path, stored: Stored, quantization: dict[str, Any]) -> None:
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def check(model: PreTrainedModel, folder: Path, **knobs: Any) -> None:
    """Served, it says what the model does."""
    core = EngineCore(
        EngineConfig(dtype="float32", quantization="none", kv_cache_memory="16MB", **knobs), str(folder)
    )
    run = run_all(core, PROMPTS, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    assert count_ties(run.tokens, [reference(model, prompt, 16) for prompt in PROMPTS]) == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])
def test_it_says_what_its_floats_say(name: str, fused: bool, tmp_path: Path) -> None:
    pack, quantization = FORMATS[name]
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    stored: Stored = {}
    with torch.no_grad():
        for key, weight in model.state_dict().items():
            if "proj" not in key:
                stored[key] = weight
                continue
            parts, meant = pack(weight)
            stored |= {f"{key.removesuffix('weight')}{end}": part for end, part in parts.items()}
            weight.copy_(meant)
    write(model, tmp_path, stored, quantization)
    check(model, tmp_path, fused=fused)


def test_experts_in_four_bits(tmp_path: Path) -> None:
    """As GPT-OSS has them; what transformers makes of them is the measure."""
    model = tiny_model_of("gpt_oss")
    stored: Stored = {}
    generator = torch.Generator().manual_seed(0)
    for key, weight in model.state_dict().items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = weight
            continue
        experts, columns, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(124, 127, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    write(model, tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    check(model, tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "foo"}, "quantized by 'foo'; what is read is gptq, awq"),
        ({"quant_method": "mxfp4"}, "says that its weights are quantized by mxfp4, and they are not"),
        ({"quant_method": "gptq", "bits": 3}, "by gptq in 3 bits; 4 and 8 are read"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "by gptq in a form that is not read: marlin"),
        ({"quant_method": "awq", "version": "GEMV"}, "by awq in a form that is not read: gemv"),
    ],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modules"])
def test_what_is_not_read_is_refused(
    quantization: dict[str, Any], message: str, fused: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    write(model, tmp_path, model.state_dict(), quantization)
    with pytest.raises(UnsupportedModelError, match=message):
        EngineCore(EngineConfig(dtype="float32", fused=fused), str(tmp_path))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": torch.zeros(128, 64, dtype=torch.int8), "what": torch.zeros(128)}, "is no floats"),
        (
            {
                "weight_packed": torch.zeros(128, 12, dtype=torch.int32),
                "weight_scale": torch.ones(128, 2),
                "weight_shape": torch.tensor([128, 64]),
            },
            "packed in another form",
        ),
        (
            {
                "weight": torch.zeros(128, 64, dtype=torch.int8),
                "weight_scale": torch.ones(128, 1),
                "weight_zero_point": torch.ones(128, 2, dtype=torch.int8),
            },
            "has zero points",
        ),
    ],
    ids=["bytes", "words", "zeros-of-groups"],
)
def test_numbers_of_another_meaning_are_refused(parts: Stored, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    name = "model.layers.0.mlp.up_proj"
    stored = {key: weight for key, weight in model.state_dict().items() if name not in key}
    method = "bitsandbytes" if "what" in parts else "compressed-tensors"
    stored |= {f"{name}.{end}": part for end, part in parts.items()}
    write(model, tmp_path, stored, {"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=f"{name}.weight.* {message}"):
        EngineCore(EngineConfig(dtype="float32", quantization="none"), str(tmp_path))


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    stored = {key: weight for key, weight in model.state_dict().items() if "layers.0.mlp.up_proj" not in key}
    parts, _ = gptq(model.state_dict()["model.layers.0.mlp.up_proj.weight"])
    stored |= {f"model.layers.0.mlp.up_proj.{end}": part for end, part in parts.items() if end != "scales"}
    write(model, tmp_path, stored, FORMATS["gptq"][1])
    with pytest.raises(UnsupportedModelError, match=r"the checkpoint lacks model.layers.0.mlp.up_proj.scales"):
        EngineCore(EngineConfig(dtype="float32", quantization="none"), str(tmp_path))
