"""Layers with a window give blocks back as a sequence gets longer, and nobody's tokens change by it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.prove import answers
from scheduler.attention import LayerSpec
from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.core.windows import Holdings
from scheduler.models.memory import bytes_per_block, group_layers
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import Reference, count_ties, reference
from tests.scheduler.engine_runs import run_all
from tests.scheduler.test_families import least_memory, tiny_model

WINDOW, ANSWER = 32, 80
GREEDY = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, seed=0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 5,
            "sliding_window_pattern": 5,
        },
    ),
}


class Windowed(NamedTuple):
    """A tiny model, and what transformers answers to some prompts that are longer than its window."""

    path: str
    prompts: list[list[int]]
    expected: list[Reference]


@pytest.fixture(scope="module", params=MODELS)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Windowed:
    family, changes = MODELS[request.param]
    model = tiny_model(family, **changes)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 199) for _ in range(length)] for length in (150, 100, 40)]
    expected = [reference(model, prompt, ANSWER) for prompt in prompts]
    assert len({tuple(one.tokens) for one in expected}) == 3, "the model says the same whatever it is asked"
    return Windowed(str(path), prompts, expected)


def engine(path: str, **knobs: Any) -> EngineCore:
    return EngineCore(EngineConfig(**{"dtype": "float32", "kv_cache_memory": "1MB", **knobs}), path)


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"max_batched_tokens": 16}, id="fused"),
        pytest.param({"max_batched_tokens": 48, "fused": False}, id="modules"),
        pytest.param({"max_batched_tokens": 48, "fused": False, "attention_backend": "torch"}, id="torch"),
    ],
)
def test_what_has_fallen_out_of_the_window_is_given_back_and_never_read(
    windowed: Windowed, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine(windowed.path, prefix_caching=False, **knobs)
    step = core.step
    windows = core.pool.windows
    held = Holdings(windows, 16, core.scheduler.max_batched_tokens)

    def poisoning() -> Any:
        """After each step, what nobody holds is not a number."""
        outputs = step()
        free = torch.tensor([core.pool.references[block] == 0 for block in range(core.pool.num_blocks)])
        for keys, values, _ in core.executor.cache.layers:
            keys[: len(free)][free] = torch.nan
            values[: len(free)][free] = torch.nan
        for sequence in core.scheduler.running.values():
            for table, limit in zip(sequence.held.tables, held.limits, strict=True):
                assert len(table.blocks) <= limit
        return outputs

    monkeypatch.setattr(core, "step", poisoning)
    run = run_all(core, windowed.prompts, GREEDY)
    assert count_ties(run.tokens, windowed.expected) == 0


def test_a_prefix_of_which_only_the_window_is_left_is_found_again(windowed: Windowed) -> None:
    core = engine(windowed.path, max_batched_tokens=16)
    run = run_all(core, windowed.prompts, GREEDY)
    assert count_ties(run.tokens, windowed.expected) == 0
    turns = [prompt + one.tokens[:-1] for prompt, one in zip(windowed.prompts, windowed.expected, strict=True)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=0)
    again = run_all(core, turns, params, name="again")
    assert (
        count_ties(again.tokens, [Reference(one.tokens[-1:], one.margins[-1:]) for one in windowed.expected]) == 0
    )
    assert again.num_cached_tokens == sum((len(turn) - 1) // 16 * 16 for turn in turns)


def test_answers_have_the_same_bits_together_in_chunks_and_after_preemption(windowed: Windowed) -> None:
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, seed=0, logprobs=2)
    prompts = windowed.prompts + [windowed.prompts[0][start : start + 5] for start in (0, 5, 10)]
    core = engine(windowed.path)
    alone = [answers(core, [prompt], params)[0][0] for prompt in prompts]
    assert answers(core, prompts, params)[0] == alone, "together, and cached"
    assert answers(engine(windowed.path, max_batched_tokens=16), prompts, params)[0] == alone, "in chunks"
    small = {"max_batched_tokens": 16, "max_model_len": 240}
    tight = engine(windowed.path, kv_cache_memory=least_memory(core.model.layers, 240, **small), **small)
    squeezed, num_preemptions = answers(tight, prompts, params)
    assert num_preemptions > 0
    assert squeezed == alone, "after preemption"


def test_more_sequences_fit_into_the_same_memory(windowed: Windowed) -> None:
    """As much as two of them would fill if every layer kept all their keys."""
    probe = engine(windowed.path)
    layers = probe.model.layers
    memory = 2 * 16 * bytes_per_block(layers, 16, torch.float32)
    core = engine(windowed.path, kv_cache_memory=memory, max_batched_tokens=16, max_model_len=256)
    for number in range(8):
        prompt = [3 + number] * 176
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=GREEDY))
    most = 0
    while core.has_work:
        outputs = core.step()
        assert outputs.step is not None and outputs.step.num_preemptions == 0
        most = max(most, outputs.state.num_running)
    assert most >= 4


FULL, NARROW = LayerSpec(8, 4, 64, 64, 0.125, None, None), LayerSpec(8, 4, 64, 64, 0.125, 512, None)


def test_layers_are_grouped_by_their_windows() -> None:
    gemma3 = [FULL if layer % 6 == 5 else NARROW for layer in range(26)]
    groups = group_layers(gemma3)
    assert [group.window for group in groups] == [None] + [512] * 6
    assert groups[0].layers == [5, 11, 17, 23]
    assert max(len(group.layers) for group in groups) == 4
    assert sorted(layer for group in groups for layer in group.layers) == list(range(26))

    assert [(group.window, len(group.layers)) for group in group_layers([FULL] * 30)] == [(None, 30)]
    assert [(group.window, len(group.layers)) for group in group_layers([NARROW] * 32)] == [(512, 32)]
    halves = group_layers([FULL, NARROW] * 13)
    assert [(group.window, len(group.layers)) for group in halves] == [(None, 13), (512, 13)]


def test_layers_of_different_shapes_are_one_group_that_keeps_all() -> None:
    wide = LayerSpec(8, 2, 64, 64, 0.125, None, None)
    (group,) = group_layers([wide, NARROW, NARROW])
    assert group == (None, [0, 1, 2])


def test_a_sequence_holds_its_window_a_chunk_and_what_their_ends_take_of_a_block() -> None:
    held = Holdings([None, 512, 512], block_size=16, longest_chunk=128)
    assert held.limits[1:] == [32 + 9, 32 + 9]
    assert held.blocks(64) == 3 * 4
    assert held.blocks(16_000) == 1000 + 2 * 41
    assert held.longest(1082) == 16_000
    assert held.longest(1081) == 16_000 - 16
    assert Holdings([512], 16, 128).longest(41) > 1 << 40, "a window holds any length"
    assert Holdings([None], 16, 128).longest(10) == 160


def test_a_long_context_takes_less_than_a_quarter(tmp_path: Path) -> None:
    """32 layers, of which one in six sees everything and the others 128 tokens: at 4,000 tokens."""
    model = tiny_model(
        "gemma3_text",
        **{"sliding_window": 128, "num_hidden_layers": 32, "sliding_window_pattern": 6},
        **{"query_pre_attn_scalar": 24, "max_position_embeddings": 4608},
    )
    model.save_pretrained(tmp_path)
    core = EngineCore(EngineConfig(dtype="float32", kv_cache_memory="256MB"), str(tmp_path))
    prompt = [3 + (7 * place * place) % 190 for place in range(4000)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    core.add(Request(request_id="long", prompt_token_ids=prompt, params=params))
    most, tokens = 0, []
    while core.has_work:
        tokens += [token for output in core.step().outputs for token in output.token_ids]
        most = max(most, core.pool.num_used)
    assert count_ties([tokens], [reference(model, prompt, 8)]) == 0
    taken = most * core.info.pool_bytes / core.info.num_blocks
    assert taken < 250 * bytes_per_block(core.model.layers, 16, torch.float32) / 4
