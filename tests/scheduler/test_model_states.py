"""Models that keep more than keys and values, or attend in a way of their own: all together where the pool can
hold what they keep, else one sequence after the other, and exact all the same. `python -m benchmarks.families`
tries all of transformers' types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import platformdirs
import pytest

from benchmarks.families.check import answers, check
from benchmarks.families.tiny import tiny_model
from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.core.step import StepInput
from scheduler.execution.runner import Runner
from scheduler.models.checks import probe
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.modules.paged_model import PagedModel
from scheduler.models.modules.sequential_model import SequentialModel
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams

PROMPTS = [[3 + (5 * place + number) % 150 for place in range(20 + 7 * number)] for number in range(5)]


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param("bart", id="bart: counts positions by itself", marks=pytest.mark.prove),
        pytest.param("diffllama", id="diffllama: two calls a layer"),
        pytest.param("deepseek_v32", id="deepseek_v32: an index", marks=pytest.mark.prove),
        pytest.param("openai-gpt", id="openai-gpt: no cache", marks=pytest.mark.prove),
    ],
)
def test_it_is_exact(model_type: str) -> None:
    """Alone, together, in chunks, with a prefix that was computed before, after a preemption."""
    found = check(model_type)
    assert (found.verdict, found.path) == ("exact", "one by one"), found.detail


TOGETHER, WITH_STATES = "together, native attention", "together, with states, native attention"
STATES = "together, with states, no attention"


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        pytest.param("gpt_oss", TOGETHER, id="gpt_oss: sinks, experts with biases"),
        pytest.param("bloom", TOGETHER, id="bloom: alibi"),
        pytest.param("mpt", TOGETHER, id="mpt: alibi", marks=pytest.mark.prove),
        pytest.param("gpt_neo", TOGETHER, id="gpt_neo: windows in a buffer"),
        pytest.param("stablelm", TOGETHER, id="stablelm: hands nothing on to attention"),
        pytest.param("afmoe", TOGETHER, id="afmoe: sees its output as another shape", marks=pytest.mark.prove),
        pytest.param("llama4_text", TOGETHER, id="llama4_text: chunks", marks=pytest.mark.prove),
        pytest.param("deepseek_v3", TOGETHER, id="deepseek_v3: latents"),
        pytest.param("longcat_flash", TOGETHER, id="longcat_flash: two attentions", marks=pytest.mark.prove),
        pytest.param("lfm2", WITH_STATES, id="lfm2: convolutions"),
        pytest.param("qwen3_next", WITH_STATES, id="qwen3_next: linear attention"),
        pytest.param("falcon_h1", WITH_STATES, id="falcon_h1: two in a layer", marks=pytest.mark.prove),
        pytest.param("granitemoehybrid", WITH_STATES, id="granitemoehybrid: Mamba", marks=pytest.mark.prove),
        pytest.param("jamba", WITH_STATES, id="jamba: goes on token by token", marks=pytest.mark.prove),
        pytest.param("mamba", STATES, id="mamba: the same, without attention"),
        pytest.param("mamba2", STATES, id="mamba2", marks=pytest.mark.prove),
    ],
)
def test_these_go_together(model_type: str, path: str) -> None:
    found = check(model_type)
    assert (found.verdict, found.path) == ("exact", path), found.detail


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="7B: rotary, one KV head", marks=pytest.mark.prove),
        pytest.param({"new_decoder_architecture": True, "num_kv_heads": 2}, id="40B: KV heads for groups"),
        pytest.param({"alibi": True, "multi_query": False, "parallel_attn": False}, id="RW-1B: alibi"),
    ],
)
def test_every_generation_of_falcon_goes_together(changes: dict[str, Any]) -> None:
    found = check("falcon", **changes)
    assert (found.verdict, found.path) == ("exact", TOGETHER), found.detail


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("lfm2"))
    tiny_model("lfm2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def diffllama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("diffllama"))
    tiny_model("diffllama").save_pretrained(folder)
    return folder


@pytest.fixture(params=["lfm2", "diffllama"])
def keeper(request: pytest.FixtureRequest) -> str:
    """A model that keeps states beside the pool, and one whose sequences run one after the other."""
    path: str = request.getfixturevalue(request.param)
    return path


def engine(path: str, **knobs: Any) -> EngineCore:
    return EngineCore(EngineConfig(**{"dtype": "float32", "kv_cache_memory": "16MB", **knobs}), path)


def kept(core: EngineCore) -> dict[int, Any]:
    """By seat."""
    if isinstance(core.model, SequentialModel):
        return dict(core.model.sequences)
    assert isinstance(core.model, PagedModel)
    assert core.model.states is not None
    return dict(core.model.states.kept)


def test_nothing_is_kept_of_those_who_have_left(keeper: str) -> None:
    core = engine(keeper)
    answers(core, PROMPTS)
    assert kept(core)
    answers(core, PROMPTS[:1])
    assert len(kept(core)) == 1


def test_what_fails_for_one_is_no_matter_to_the_others(keeper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is run again in parts, and what it did before it failed is not done twice."""
    expected = answers(engine(keeper), PROMPTS)
    collect = Runner.collect
    failures: list[int] = []

    def failing(runner: Runner, launched: Any) -> Any:
        step: StepInput = launched.step
        if len(step.chunks) > 1 and len(failures) < 3:
            failures.append(len(step.chunks))
            raise ZeroDivisionError
        return collect(runner, launched)

    monkeypatch.setattr(Runner, "collect", failing)
    assert answers(engine(keeper), PROMPTS) == expected
    assert len(failures) == 3


@pytest.mark.parametrize("model_type", ["lfm2", pytest.param("qwen3_next", marks=pytest.mark.prove)])
def test_a_prefix_is_cached_with_the_state_behind_it(model_type: str, tmp_path: Path) -> None:
    """Behind a prompt and its answer, so that a chat goes on; and where two prompts part, for the third."""
    tiny_model(model_type).save_pretrained(tmp_path)
    core, plain = engine(str(tmp_path)), engine(str(tmp_path), prefix_caching=False)
    shared = [3 + 7 * place % 150 for place in range(48)]
    first, second, third = ([*shared, *([number] * 20)] for number in (5, 6, 7))

    def cached(prompt: list[int]) -> int:
        request = Request(request_id="x", prompt_token_ids=prompt, params=SamplingParams())
        return core.scheduler.seating.num_cached_tokens(request)

    (answer,) = answers(core, [first])
    assert [answer] == answers(plain, [first])
    chat = [*first, *answer, 9, 9, 9]
    assert (cached(first), cached(chat)) == (64, (len(first) + len(answer) - 1) // 16 * 16)
    assert cached(second) == 0
    assert answers(core, [chat, second]) == answers(plain, [chat, second])
    assert cached(third) == 48
    assert answers(core, [third]) == answers(plain, [third])


def test_the_memory_of_states_is_counted(lfm2: str) -> None:
    """Keys and values of two layers in a block of 16 tokens: 2 heads of 16 numbers in float32. For each seat the
    inputs of two convolutions, 64 numbers of the last 3 tokens, before a step and after it, and two that are put
    aside."""
    core = engine(lfm2, max_num_seqs=4)
    per_seat, per_block = 4 * 2 * 3 * 64 * 4, 16 * 2 * 2 * 2 * 16 * 4
    assert core.info.num_blocks == (16 * 10**6 - 4 * per_seat) // per_block


def test_the_memory_of_a_models_own_cache_is_counted(diffllama: str) -> None:
    """Keys and values of four layers for each token: 4 heads of 16 numbers in float32."""
    core = engine(diffllama, max_num_seqs=4)
    assert isinstance(core.model, SequentialModel)
    own = core.model.measure()
    assert (own.per_token, own.per_seat) == (4 * 2 * 4 * 16 * 4, 0)
    assert core.info.num_blocks == 16 * 10**6 // (16 * own.per_token)


def test_what_cannot_be_taken_back_is_not_guessed(keeper: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"--speculative.*no token can be taken back"):
        engine(keeper, speculative="ngram")


def test_what_was_found_out_is_remembered(
    lfm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    expected = answers(engine(lfm2), PROMPTS[:1])
    assert len(list((tmp_path / "carousel" / "probes").iterdir())) == 1

    def forgotten(config: object) -> Any:
        raise AssertionError("it is looked for again")

    monkeypatch.setattr(probe, "_find_way", forgotten)
    assert answers(engine(lfm2), PROMPTS[:1]) == expected


def test_a_cache_that_changes_the_answer_is_refused(tmp_path: Path) -> None:
    tiny_model("cpmant").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"the cache of CpmAnt\w+: the logits differ by"):
        engine(str(tmp_path))


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.is_decoder = False
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="it is an encoder"):
        engine(str(tmp_path))
