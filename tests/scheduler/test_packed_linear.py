"""Native products under transformers' modules: near float32 in every mode, and the model given stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.families.tiny import tiny_model as tiny_model_of
from scheduler.attention import PackedBatch
from scheduler.config import EngineConfig
from scheduler.core.attention import TorchAttention
from scheduler.core.kv_cache import KVCache
from scheduler.models.model_config import read_config
from scheduler.models.modules.absent_weight import WeightReadError
from scheduler.models.modules.latent_attention import PackedLatent, latent_of
from scheduler.models.modules.packed_experts import PackedExperts
from scheduler.models.modules.packed_linear import PackedLinear, num_weights, pack_linears, weights_bytes
from scheduler.models.modules.paged_model import PagedModel, load_model
from scheduler.models.products import Mode
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import FAMILIES, tiny_model

CPU = torch.device("cpu")


def logits(model: PagedModel, num_tokens: int = 40) -> torch.Tensor:
    """Of every token of one prompt."""
    rows = torch.arange(num_tokens)
    batch = PackedBatch(
        input_ids=rows * 7 % 190 + 3,
        positions=rows,
        slot_mapping=rows.unsqueeze(0),
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.arange(3, dtype=torch.int32).view(1, 1, -1),
        read_rows=torch.empty(0, dtype=torch.int64),
        sample_rows=rows,
        query_lens=[num_tokens],
        contexts=[num_tokens],
    )
    cache = KVCache(
        model.layers, TorchAttention(), num_blocks=3, block_size=16, dtype=model.module.dtype, device=CPU
    )
    model.bind(cache, num_tokens)
    return model.forward(batch).logits.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mode_gives_the_models_logits(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    tiny_model(family, **changes).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), read_config(str(tmp_path)), CPU)
    expected = logits(model)
    modes: dict[Mode, float] = {"f32": 1e-5, "bf16": 0.05, "int8": 0.1, "int4": 0.5}
    for mode, tolerance in modes.items():
        packed = pack_linears(model, mode, num_threads=2)
        assert not any(type(module) is nn.Linear for module in packed.module.modules())
        error = (logits(packed) - expected).norm() / expected.norm()
        assert error < tolerance, f"{mode}: {error:.2g}"
    # With tied weights, head and embedding are one tensor: packing the head must leave the embedding.
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_for_a_family_that_is_not_fused(
    dtype: str, kv_cache_dtype: str, backend: str, tmp_path: Path
) -> None:
    tiny_model("olmo2", head_dim=16, hidden_size=96).save_pretrained(tmp_path)
    knobs = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "attention_backend": backend}
    core = EngineCore(EngineConfig(quantization="int8", **knobs), str(tmp_path))
    assert core.executor.cache.layers[0][0].dtype == getattr(torch, kv_cache_dtype)
    assert core.info.products == "int8"
    run = run_all(
        core, [[5, 6, 7], [9] * 40], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, seed=0)
    )
    assert [len(tokens) for tokens in run.tokens] == [8, 8]


@pytest.mark.parametrize("mode", ["int4", "int8", "bf16", "f32"])
def test_a_row_of_a_layer_does_not_depend_on_its_company(mode: Mode) -> None:
    layer = PackedLinear(nn.Linear(70, 50), "layer", mode, num_threads=2)
    x = torch.randn(2, 9, 70)
    together = layer(x)
    assert together.shape == (2, 9, 50)
    assert torch.equal(layer(x[1, 4:5]), together[1, 4:5])


def test_weights_that_are_packed_are_read_by_nobody() -> None:
    """torch would compute with whatever is in memory."""
    layer = PackedLinear(nn.Linear(70, 50), "router", "f32", num_threads=1)
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (torch.float32, (50, 70))
    with pytest.raises(WeightReadError, match="router"):
        nn.functional.linear(torch.randn(3, 70), layer.weight)


def test_a_layer_whose_weights_are_read_by_the_model_stays(tmp_path: Path) -> None:
    """LongCat's routers do."""
    tiny_model_of("longcat_flash").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), read_config(str(tmp_path)), CPU)
    packed = pack_linears(model, "f32", num_threads=1)
    plain = {name for name, module in packed.module.named_modules() if type(module) is nn.Linear}
    assert plain
    assert all("router" in name for name in plain)
    assert any(isinstance(module, PackedLinear) for module in packed.module.modules())
    assert (logits(packed) - logits(model)).norm() < 1e-4 * logits(model).norm()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "aria_text", "gpt_oss", "deepseek_v3"])
def test_experts_are_products_of_groups(model_type: str, tmp_path: Path) -> None:
    """Their weights one way and the other, with biases and without, beside latent attention. In fewer bits a
    router may choose others."""
    tiny_model_of(model_type).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), read_config(str(tmp_path)), CPU)
    expected = logits(model)
    for mode, tolerance in (("f32", 1e-4), ("bf16", 0.3), ("int8", 0.3)):
        packed = pack_linears(model, mode, num_threads=2)  # type: ignore[arg-type]
        experts = [module for module in packed.module.modules() if isinstance(module, PackedExperts)]
        assert experts
        assert (logits(packed) - expected).norm() < tolerance * expected.norm()
        assert num_weights(packed.module) == num_weights(model.module)
        assert mode == "f32" or weights_bytes(packed.module) < 0.8 * weights_bytes(model.module)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("mode", ["f32", "int8"])
def test_the_pool_holds_latents(mode: Mode, tmp_path: Path) -> None:
    tiny_model_of("deepseek_v3").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), read_config(str(tmp_path)), CPU)
    config = model.config
    for spec in model.layers:
        assert (spec.num_heads, spec.num_kv_heads) == (config.num_attention_heads, 1)
        assert spec.key_dim == config.kv_lora_rank + config.qk_rope_head_dim
        assert spec.value_dim == config.kv_lora_rank
    packed = pack_linears(model, mode, num_threads=2)
    latents = [latent for module in packed.module.modules() if (latent := latent_of(module)) is not None]
    assert len(latents) == config.num_hidden_layers
    assert all(isinstance(latent, PackedLatent) for latent in latents)
