"""GGUF files of architectures that transformers has a model for and does not read, and of scaled positions: each
gives the tokens of the checkpoint that it was converted from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from benchmarks.families import tiny
from benchmarks.families.gguf_writer import copy_tokenizer, write_gguf
from scheduler.models.files import model_source
from scheduler.models.files.gguf_description import config_of, cut
from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.files.gguf_split import GgufError
from scheduler.models.files.model_source import WARNING, ModelNotFoundError, resolve_model
from scheduler.models.model_config import UnsupportedModelError
from scheduler.text.tokenizer import Tokenizer
from tests.scheduler.test_families import tiny_model
from tests.scheduler.test_what_files_say import check, serve

OWN: dict[str, dict[str, Any]] = {
    "gemma": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "granite": {
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_bias": True,
    },
    "cohere": {"use_qk_norm": True},
    "glm4": {"attention_bias": False},
    "ministral3": {},
}


@pytest.fixture(autouse=True)
def _in_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "models_folder", lambda: tmp_path / "models")


def described(file: Path) -> None:
    """Make the configuration that lies beside a file of what the file says."""
    config_of(GgufFile(file)).save_pretrained(file.parent)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", OWN)
def test_a_mapping_of_our_own(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(name, **OWN[name])
    file = tmp_path / "model.gguf"
    write_gguf(model, file, {"": kind})
    described(file)
    if kind != "F32":  # its numbers are those of the file
        for stored, parameter in zip(map(np.asarray, quantized(model, kind)), matrices(model), strict=True):
            parameter.data.copy_(parameter.new_tensor(stored))
    check(model, tmp_path, fused=False)


def matrices(model: Any) -> list[Any]:
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and not name.endswith("norm.weight")
    ]


def quantized(model: Any, kind: str) -> list[Any]:
    number = gguf.GGMLQuantizationType[kind]
    return [
        gguf.quants.dequantize(gguf.quants.quantize(each.detach().numpy(), number), number)
        for each in matrices(model)
    ]


def test_a_file_alone_is_a_model_with_its_tokenizer(model_path: str, tmp_path: Path) -> None:
    (stored,) = Path(model_path).glob("*.gguf")
    known = Tokenizer(model_path)
    model = tiny.tiny_model("olmo2", vocab_size=49_152)
    write_gguf(model, tmp_path / "olmo.gguf", {"": "F32"}, vocabulary=partial(copy_tokenizer, stored))
    folder = resolve_model(str(tmp_path / "olmo.gguf"))
    text = "Tokens, 1234 of them:\n\tнiño 🎠 <|im_start|>"
    found = Tokenizer(folder)
    assert found.encode(text) == known.encode(text)
    assert found.decode(found.encode(text)) == known.decode(known.encode(text))
    check(model, Path(folder), fused=False)


@pytest.mark.parametrize(
    ("name", "is_known"), [("smollm", True), ("glm4", True), ("tekken", True), ("runes", False)]
)
def test_how_a_text_is_cut_is_known_or_it_is_said(
    name: str, is_known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    cut(GgufFile(tmp_path / "model.gguf"))
    said = capsys.readouterr().err
    assert (said == "") if is_known else said.startswith(f"{WARNING}text is cut as GPT-2 does, for how 'runes'")


def write_with_tokenizer(name: str, kind: str, file: Path) -> Any:
    """A vocabulary of single bytes, without merges, and with scores where `kind` has them."""
    model = tiny.tiny_model(name)
    write_gguf(model, file, {"": "F32"}, vocabulary=lambda writer: tokens_of_bytes(writer, kind))
    return model


def tokens_of_bytes(writer: gguf.GGUFWriter, kind: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if kind == "llama":
        writer.add_token_scores([0.0] * len(tokens))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_small_vocabulary_of_sentencepiece(name: str, tmp_path: Path) -> None:
    model = write_with_tokenizer(name, "llama", tmp_path / "tiny.gguf")
    folder = resolve_model(str(tmp_path / "tiny.gguf"))
    assert Tokenizer(folder).decode(Tokenizer(folder).encode("the sky é")) == "the sky é"
    check(model, Path(folder), fused=name == "llama")


def test_a_tokenizer_without_merges_is_refused_in_a_sentence(tmp_path: Path) -> None:
    write_with_tokenizer("llama", "gpt2", tmp_path / "tiny.gguf")
    with pytest.raises(ModelNotFoundError, match="its tokenizer has neither merges nor 'scores'"):
        resolve_model(str(tmp_path / "tiny.gguf"))


def test_a_tensor_that_is_left_over_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(tiny.tiny_model("olmo2"), file, {"": "F32"}, more={"blk.0.attn_q.bias_": np.zeros(4, np.float32)})
    described(file)
    with pytest.raises(UnsupportedModelError, match=r"the checkpoint has, unlike this model, blk\.0\.attn_q"):
        serve(tmp_path)


SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2"])
def test_positions_that_are_scaled(family: str, kind: str, fused: bool, tmp_path: Path) -> None:
    if family == "olmo2" and fused:
        pytest.skip("this family is not fused")
    make = tiny.tiny_model if family == "olmo2" else tiny_model
    model = make(family, rope_parameters=SCALED[kind], max_position_embeddings=256)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, {"": "F32"})
    described(file)
    check(model, tmp_path, fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_positions_of_gemma_3_are_scaled_where_it_looks_at_everything(fused: bool, tmp_path: Path) -> None:
    near = {"rope_type": "default", "rope_theta": 10000.0}
    far = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model(
        "gemma3_text",
        num_hidden_layers=2,
        layer_types=kinds,
        rope_parameters=dict(zip(kinds, (near, far), strict=True)),
    )
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"})
    model.config.rope_parameters["full_attention"] = {**far, "rope_type": "default"}
    model.config.save_pretrained(tmp_path)
    check(model, tmp_path, fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_a_configuration_beside_a_file_that_does_not_know_of_its_scaling(fused: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters=SCALED["yarn"], max_position_embeddings=256)
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"})
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model.config.save_pretrained(tmp_path)
    check(model, tmp_path, fused=fused)


def test_an_architecture_of_our_own_beside_a_configuration_that_does_not_know(tmp_path: Path) -> None:
    model = tiny.tiny_model("olmo2", rope_parameters=SCALED["yarn"], max_position_embeddings=256)
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"})
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model.config.save_pretrained(tmp_path)
    check(model, tmp_path, fused=False)


def test_factors_of_positions_in_an_architecture_of_our_own(tmp_path: Path) -> None:
    model = tiny.tiny_model("granite")
    factors = np.linspace(1.0, 4.0, len(model.model.rotary_emb.inv_freq), dtype=np.float32)
    write_gguf(model, tmp_path / "model.gguf", {"": "F32"}, more={"rope_freqs.weight": factors})
    described(tmp_path / "model.gguf")
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    check(model, tmp_path, fused=False)


def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_key_value("llama.rope.scaling.type", "spiral", gguf.GGUFValueType.STRING)
    writer.add_rope_scaling_factor(2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GgufError, match="positions are scaled by 'spiral'"):
        described(file)
