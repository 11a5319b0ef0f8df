"""FlexAttention against the plain reference. On a CPU it runs uncompiled: the same tiles, blocks and masks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scheduler.attention import BackendError, LayerCache, LayerSpec, PackedBatch
from scheduler.attention.flex_backend import FlexAttention, Tiles, Visits
from scheduler.config import EngineConfig
from scheduler.core.attention import TorchAttention
from scheduler.execution.cuda_graphs import DecodeInput
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import FAMILIES, tiny_model

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 16, 60

SPECS = {
    "plain": LayerSpec(4, 4, 16, 16, 0.25, None, None),
    "grouped": LayerSpec(6, 2, 32, 32, 0.2, None, None),
    "window": LayerSpec(6, 2, 16, 16, 0.25, 20, None),
    "softcap": LayerSpec(8, 1, 16, 16, 0.3, None, 5.0),
}
BATCHES = {  # (new tokens, context) of each sequence
    "decode": [(1, 33), (1, 5), (1, 20), (1, 100), (1, 64)],
    "decode-alone": [(1, 9)],
    "prefill": [(70, 70)],
    "mixed": [(70, 70), (1, 30), (5, 90), (64, 64), (130, 200), (1, 1)],
}


def random_batch(lens: list[tuple[int, int]]) -> PackedBatch:
    """Sequences in blocks drawn at random; what a block table holds beyond a context is another's."""
    ids = torch.randperm(NUM_BLOCKS, dtype=torch.int32)
    counts = [-(-context // BLOCK) for _, context in lens]
    tables = ids[: max(counts) + 1].repeat(len(lens), 1)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = ids[first : first + count]
        first += count
    positions = [torch.arange(context - new, context) for new, context in lens]
    slots = [tables[row, places // BLOCK].long() * BLOCK + places % BLOCK for row, places in enumerate(positions)]
    new_tokens = [new for new, _ in lens]
    return PackedBatch(
        input_ids=torch.zeros(sum(new_tokens), dtype=torch.int64),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots).unsqueeze(0),
        query_start=torch.tensor([0, *new_tokens]).cumsum(0).int(),
        context_lens=torch.tensor([context for _, context in lens], dtype=torch.int32),
        block_tables=tables.unsqueeze(0),
        read_rows=torch.empty(0, dtype=torch.int64),
        sample_rows=torch.arange(0),
        query_lens=new_tokens,
        contexts=[context for _, context in lens],
    )


def random_states(spec: LayerSpec, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(num_tokens, spec.num_heads, spec.key_dim),
        torch.randn(num_tokens, spec.num_kv_heads, spec.key_dim),
        torch.randn(num_tokens, spec.num_kv_heads, spec.value_dim),
    )


def random_cache(spec: LayerSpec, num_blocks: int = NUM_BLOCKS) -> LayerCache:
    keys, values = FlexAttention(CPU).allocate(spec, num_blocks, BLOCK, torch.float32, CPU)
    return LayerCache(keys.normal_(), values.normal_())


@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_it_gives_what_the_reference_gives(spec: LayerSpec, lens: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    batch = random_batch(lens)
    states = random_states(spec, len(batch.input_ids))
    cache = random_cache(spec)
    copy = LayerCache(cache.keys.clone(), cache.values.clone())
    output = FlexAttention(CPU).attend(*states, cache, batch, spec)
    expected = TorchAttention().attend(*states, copy, batch, spec)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(cache.keys, copy.keys)
    assert torch.equal(cache.values, copy.values)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES.keys())
def test_a_tile_visits_the_blocks_that_it_sees_and_no_others(
    lens: list[tuple[int, int]], window: int | None
) -> None:
    """The uncompiled kernel looks at masks only; the compiled one also trusts these lists."""
    torch.manual_seed(0)
    batch = random_batch(lens)
    tiles = Tiles.of(batch)
    _, counts, blocks = Visits.of(batch, tiles, NUM_BLOCKS, BLOCK, group=0, window=window)
    for tile, sequence in enumerate(tiles.sequences.tolist()):
        seen = {
            position
            for query in tiles.positions[tile].tolist()
            for position in range(0 if window is None else max(0, query - window + 1), query + 1)
        }
        expected = [int(batch.block_tables[0, sequence, place]) for place in sorted({p // BLOCK for p in seen})]
        assert blocks[tile, 0, 0, : counts[tile].item()].tolist() == expected


@pytest.mark.parametrize("attention", [FlexAttention(CPU), TorchAttention()], ids=["flex", "torch"])
def test_entries_of_a_block_table_that_are_out_of_the_window_may_be_anything(
    attention: FlexAttention | TorchAttention,
) -> None:
    torch.manual_seed(0)
    spec = SPECS["window"]
    assert spec.sliding_window is not None
    batch = random_batch(BATCHES["mixed"])
    states, cache = random_states(spec, len(batch.input_ids)), random_cache(spec)
    expected = attention.attend(*states, cache, batch, spec)
    tables = batch.block_tables.clone()
    for row, (new, context) in enumerate(BATCHES["mixed"]):
        gone = max(0, context - new - spec.sliding_window + 1) // BLOCK
        tables[0, row, :gone] = tables[0, row, (context - 1) // BLOCK]
    assert not torch.equal(tables, batch.block_tables)
    stale = replace(batch, block_tables=tables)
    assert torch.equal(attention.attend(*states, cache, stale, spec), expected)


def test_padding_rows_of_a_decode_step_touch_nothing_of_the_others() -> None:
    torch.manual_seed(0)
    spec = SPECS["window"]
    static = DecodeInput(8, num_groups=1, table_width=20, spare_block=NUM_BLOCKS, block_size=BLOCK, device=CPU)
    static.load(random_batch([(1, 50)] * 8))  # an earlier step, whose rows must not linger
    batch = random_batch(BATCHES["decode"])
    size = len(batch.query_lens)
    static.load(batch)
    padded = static.first(8)
    query, key, value = random_states(spec, 8)
    cache = random_cache(spec, NUM_BLOCKS + 1)
    copy = LayerCache(cache.keys.clone(), cache.values.clone())
    output = FlexAttention(CPU).attend(query, key, value, cache, padded, spec)
    expected = TorchAttention().attend(query[:size], key[:size], value[:size], copy, batch, spec)
    torch.testing.assert_close(output[:size], expected, atol=2e-6, rtol=1e-5)
    assert output.isfinite().all()
    for written, right in ((cache.keys, copy.keys), (cache.values, copy.values)):
        assert torch.equal(written[:NUM_BLOCKS], right[:NUM_BLOCKS])


@pytest.mark.parametrize("attention", [FlexAttention(CPU), TorchAttention()], ids=["flex", "torch"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_what_is_not_finite_reaches_those_who_see_it_and_nobody_who_has_their_blocks_later(
    spec: LayerSpec, attention: FlexAttention | TorchAttention
) -> None:
    torch.manual_seed(0)
    clean = LayerCache(*attention.allocate(spec, NUM_BLOCKS, BLOCK, torch.float32, CPU))
    clean.keys.zero_()
    clean.values.zero_()
    stale = LayerCache(clean.keys.clone(), clean.values.clone())
    query, key, value = random_states(spec, BLOCK * NUM_BLOCKS)
    value[::2], value[1::4] = torch.nan, torch.inf
    everywhere = random_batch([(BLOCK * NUM_BLOCKS, BLOCK * NUM_BLOCKS)])
    assert attention.attend(query, key, value, stale, everywhere, spec).isnan().all()
    batch = random_batch([(70, 70), (5, 5), (64, 64), (130, 130), (1, 1)])
    states = random_states(spec, len(batch.input_ids))
    expected = attention.attend(*states, clean, batch, spec)
    assert expected.isfinite().all()
    assert torch.equal(attention.attend(*states, stale, batch, spec), expected)


@pytest.mark.parametrize("name", ["mistral-window", "gemma2"])
def test_an_engine_runs_on_it(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 199) for _ in range(length)] for length in (5, 70)]
    expected = [reference(model, prompt, 4) for prompt in prompts]
    core = EngineCore(
        EngineConfig(
            attention_backend="flex", device="cpu", dtype="float32", max_batched_tokens=64, max_model_len=128
        ),
        str(tmp_path),
    )
    assert core.info.attention_backend == "flex"
    run = run_all(core, prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, seed=0))
    assert count_ties(run.tokens, expected) == 0


def test_what_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(BackendError, match="flex: --block-size must be a power of two"):
        EngineCore(EngineConfig(attention_backend="flex", block_size=24, dtype="float32"), str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_tokens_on_a_gpu_are_those_of_the_cpu(name: str, cuda_graphs: bool, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 199) for _ in range(length)] for length in (1, 3, 16, 17, 64, 90)]
    expected = [reference(model, prompt, 24) for prompt in prompts]
    core = EngineCore(
        EngineConfig(device="cuda", dtype="float32", max_batched_tokens=64, cuda_graphs=cuda_graphs),
        str(tmp_path),
    )
    assert core.info.attention_backend == "flex"
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=0)
    for start in (0, 1, 4):  # batches of several sizes, and sizes that repeat with other sequences
        run = run_all(core, prompts[start:], params, name=f"{start}-")
        assert count_ties(run.tokens, expected[start:]) == 0
