"""Checkpoints of which a reader may believe the wrong thing: the files decide, or it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.families.gguf_writer import write_gguf
from scheduler.config import EngineConfig
from scheduler.models.checks import second_gguf
from scheduler.models.files.gguf_description import end_tokens
from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.files.gguf_split import GgufError
from scheduler.models.files.model_source import ModelNotFoundError, resolve_model
from scheduler.models.fused.fused_model import FusedModel
from scheduler.models.model_config import UnsupportedModelError, read_config
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import tiny_model

STORED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

PROMPTS = [[5, 6, 7], [9 + place % 90 for place in range(100)]]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def serve(folder: Path, **knobs: Any) -> EngineCore:
    return EngineCore(EngineConfig(**{"dtype": "float32", "kv_cache_memory": "8MB", **knobs}), str(folder))


def check(model: PreTrainedModel, folder: Path, *, fused: bool = True) -> None:
    core = serve(folder, fused=fused)
    assert isinstance(core.model, FusedModel) == fused
    assert run_all(core, PROMPTS, GREEDY).tokens == [reference(model, prompt, 16).tokens for prompt in PROMPTS]


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_head_in_the_file_counts_though_the_config_says_that_it_is_tied(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    change(tmp_path / "config.json", tie_word_embeddings=True)
    for fused in (True, False):
        check(model, tmp_path, fused=fused)


def test_biases_that_a_gguf_file_has_and_the_config_does_not_say(tmp_path: Path) -> None:
    """Its file decides where that can be; transformers' modules would leave them out."""
    model = tiny_model("llama", attention_bias=True, mlp_bias=True, hidden_size=96, intermediate_size=128)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"})
    model.config.save_pretrained(tmp_path)
    for fused in (True, False):
        check(model, tmp_path, fused=fused)
    change(tmp_path / "config.json", attention_bias=False, mlp_bias=False)
    check(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"has, unlike this model, blk\.0\.attn_k\.bias"):
        serve(tmp_path, fused=False)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gguf_file_with_more_than_the_model_takes_is_refused(fused: bool, tmp_path: Path) -> None:
    """Here the factors of a long context, as files of Phi-3 have them."""
    model = tiny_model("llama", hidden_size=96, intermediate_size=128)
    more = {"rope_factors_long.weight": np.ones(8, np.float32)}
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"}, more)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"has, unlike this model, rope_factors_long\.weight"):
        serve(tmp_path, fused=fused)


def test_weights_of_a_decoder_that_was_saved_without_a_head(tmp_path: Path) -> None:
    """As models for embeddings are published (Qwen3-Embedding)."""
    model = tiny_model("qwen3", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    weights = {name.removeprefix("model."): weight for name, weight in model.model.state_dict().items()}
    assert "embed_tokens.weight" in weights
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for fused in (True, False):
        check(model, tmp_path, fused=fused)


def test_sizes_that_the_kernels_do_not_take(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=72, num_attention_heads=6)
    model.save_pretrained(tmp_path)
    check_general(model, tmp_path)


def check_general(model: PreTrainedModel, folder: Path) -> None:
    core = serve(folder)
    assert not isinstance(core.model, FusedModel)
    assert run_all(core, PROMPTS, GREEDY).tokens == [reference(model, prompt, 16).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("fused", [True, False])
def test_a_size_in_the_config_that_is_not_the_weights(fused: bool, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path / "config.json", intermediate_size=112)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.\w+_proj\.weight") as refused:
        serve(tmp_path, fused=fused)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "it is an encoder (bert), which has no next token to give"),
        ({"model_type": "strange"}, "does not know its type 'strange'"),
        (
            {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}},
            "code from a model's folder is never run",
        ),
    ],
)
def test_what_is_no_model_for_text_is_refused_in_a_sentence(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=re.escape(message)) as refused:
        read_config(str(tmp_path))
    assert len(str(refused.value)) < 200


# What ends an answer -------------------------------------------------------------------------------------


def test_an_answer_ends_with_what_the_tokenizer_says_too(tmp_path: Path) -> None:
    tiny_model("llama", eos_token_id=2).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "<end>"}]}))
    assert read_config(str(tmp_path)).eos_token_ids == {2, 7}
    change(tmp_path / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<end>"}})
    assert read_config(str(tmp_path)).eos_token_ids == {2, 9}


def test_an_end_that_is_no_token_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change(tmp_path / "config.json", eos_token_id=["x"])
    with pytest.raises(UnsupportedModelError, match=r"eos_token_id.*'x'"):
        serve(tmp_path)


# GGUF files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q2_K", "IQ4_NL"])
def test_some_rows_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    """Of a tensor that is read to check what was read; one that lies behind another."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 256, (32, 2 * size), dtype=np.uint8)
    (tmp_path / "blocks").write_bytes(bytes(64) + data.tobytes())
    place = second_gguf.Place([32, 2 * block], int(number), 64, tmp_path / "blocks")
    with np.errstate(invalid="ignore", over="ignore"):
        whole, some = second_gguf.read_floats(place), second_gguf.read_floats(place, [3, 1])
    assert whole.shape == (32, 2 * block)
    torch.testing.assert_close(some, whole[[3, 1]], equal_nan=True, rtol=0, atol=0)


def test_a_file_that_was_split_is_read_as_one(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=128)
    whole = tmp_path / "whole.gguf"
    write_gguf(model, whole, {"": "Q8_0"})
    parts = [tmp_path / f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    split(whole, parts)
    both, one = GgufFile(parts[0]), GgufFile(whole)
    assert both.tensors.keys() == one.tensors.keys()
    assert all(np.array_equal(both.read(name), one.read(name)) for name in one.tensors)
    assert both.metadata.items() >= one.metadata.items()
    whole.unlink()
    model.config.save_pretrained(tmp_path)
    core = serve(tmp_path)
    assert isinstance(core.model, FusedModel)
    with pytest.raises(GgufError, match=r"give the first one, model-00001-of-00002\.gguf"):
        GgufFile(parts[1])
    parts[1].unlink()
    with pytest.raises(GgufError, match=r"split into 2 files, and model-00002-of-00002\.gguf is not beside it"):
        GgufFile(parts[0])


def split(whole: Path, parts: list[Path]) -> None:
    """As gguf-split does: the metadata in the first part, and the tensors in all of them."""
    reader = gguf.GGUFReader(whole)
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        for tensor in reader.tensors[number :: len(parts)]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def test_a_file_for_another_kind_of_processor(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(40))
    with pytest.raises(GgufError, match="is big-endian"):
        GgufFile(file)


def test_a_folder_with_gguf_files_alone(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="this folder has 2 GGUF files: give one of them"):
        resolve_model(str(tmp_path))


def test_a_file_is_found_whatever_the_case_of_its_name(model_path: str, tmp_path: Path) -> None:
    (stored,) = Path(model_path).glob("*.gguf")
    for name in ("Model.GGUF", "model.gguf"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).symlink_to(stored.resolve())
        for asked in (folder, folder / name):
            found = Path(resolve_model(str(asked)))
            assert (found / "config.json").is_file()
            assert [file.resolve() for file in found.glob("*.gguf")] == [stored.resolve()]


def test_whatever_ends_a_text_or_a_turn_in_a_gguf_file(model_path: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for add, token_id in (
        (writer.add_eos_token_id, 2),
        (writer.add_eot_token_id, 9),
        (writer.add_eom_token_id, 8),
    ):
        add(token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert end_tokens(GgufFile(tmp_path / "model.gguf"), 3) == [2, 3, 8, 9]
    header = GgufFile(next(Path(model_path).glob("*.gguf")))
    named = {header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    assert read_config(model_path).eos_token_ids >= named - {None}


# Numbers in 8 bits ----------------------------------------------------------------------------------------


def in_blocks(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float8 numbers, the factors of their blocks, and what they mean."""
    rows, columns = (-(-side // size) for side in weight.shape)
    scale = torch.ones(rows, columns)
    whole = torch.zeros(rows * size, columns * size)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    blocks = whole.view(rows, size, columns, size)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
    factors = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[: weight.shape[0], : weight.shape[1]]
    numbers = (weight / factors).to(torch.float8_e4m3fn)
    return numbers, scale, numbers.float() * factors


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_have_the_size_that_is_stated(fused: bool, tmp_path: Path) -> None:
    """Where a side is no multiple of it: 112 rows are three blocks of 48, the last of them cut, and not of 38."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=112, num_attention_heads=4)
    stored = dict(model.state_dict())
    with torch.no_grad():
        for name in [name for name in stored if "proj" in name]:
            numbers, scale, meant = in_blocks(stored[name], 48)
            model.get_parameter(name).copy_(meant)
            stored |= {name: numbers, name + "_scale": scale}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    change(tmp_path / "config.json", quantization_config=method | groups)
    core = serve(tmp_path, fused=fused, quantization="none")
    assert isinstance(core.model, FusedModel) == fused
    assert run_all(core, PROMPTS, GREEDY).tokens == [reference(model, prompt, 16).tokens for prompt in PROMPTS]
    change(tmp_path / "config.json", quantization_config=method)
    with pytest.raises(UnsupportedModelError, match="does not say for which blocks"):
        serve(tmp_path, fused=fused)
