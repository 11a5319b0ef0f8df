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
from scheduler.engine.core import EngineCore
from scheduler.execution.runner import Runner
from scheduler.models import probe
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.sequential_model import SequentialModel
from scheduler.step import StepInput

PROMPTS = [[3 + (5 * place + number) % 150 for place in range(20 + 7 * number)] for number in range(5)]


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param("bloom", id="bloom: alibi"),
        pytest.param("falcon", id="falcon: attention classes"),
        pytest.param("bart", id="bart: counts positions by itself", marks=pytest.mark.prove),
        pytest.param("diffllama", id="diffllama: two calls a layer"),
        pytest.param("afmoe", id="afmoe: its attention's output is not contiguous", marks=pytest.mark.prove),
        pytest.param("lfm2", id="lfm2: convolutions"),
        pytest.param("qwen3_next", id="qwen3_next: linear attention"),
        pytest.param("granitemoehybrid", id="granitemoehybrid: state space", marks=pytest.mark.prove),
        pytest.param("deepseek_v32", id="deepseek_v32: an index", marks=pytest.mark.prove),
        pytest.param("jamba", id="jamba: token by token", marks=pytest.mark.prove),
        pytest.param("openai-gpt", id="openai-gpt: no cache", marks=pytest.mark.prove),
    ],
)
def test_it_is_exact(model_type: str) -> None:
    """Alone, together, in chunks, with a prefix that was computed before, after a preemption."""
    found = check(model_type)
    assert (found.verdict, found.path) == ("exact", "one by one"), found.detail


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param("gpt_oss", id="gpt_oss: sinks, experts with biases"),
        pytest.param("llama4_text", id="llama4_text: chunks"),
        pytest.param("deepseek_v3", id="deepseek_v3: latents"),
        pytest.param("longcat_flash", id="longcat_flash: two attentions a layer", marks=pytest.mark.prove),
    ],
)
def test_these_go_together(model_type: str) -> None:
    found = check(model_type)
    assert (found.verdict, found.path) == ("exact", "together, native attention"), found.detail


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("lfm2"))
    tiny_model("lfm2").save_pretrained(folder)
    return folder


def engine(path: str, **knobs: Any) -> EngineCore:
    return EngineCore(EngineConfig(**{"dtype": "float32", "kv_cache_memory": "16MB", **knobs}), path)


def test_nothing_is_kept_of_those_who_have_left(lfm2: str) -> None:
    core = engine(lfm2)
    assert isinstance(core.model, SequentialModel)
    answers(core, PROMPTS)
    assert core.model._sequences
    answers(core, PROMPTS[:1])
    assert len(core.model._sequences) == 1


def test_what_fails_for_one_is_no_matter_to_the_others(lfm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is run again in parts, and what it did before it failed is not done twice."""
    expected = answers(engine(lfm2), PROMPTS)
    collect = Runner.collect
    failures: list[int] = []

    def failing(runner: Runner, launched: Any) -> Any:
        step: StepInput = launched.step
        if len(step.chunks) > 1 and len(failures) < 3:
            failures.append(len(step.chunks))
            raise ZeroDivisionError
        return collect(runner, launched)

    monkeypatch.setattr(Runner, "collect", failing)
    assert answers(engine(lfm2), PROMPTS) == expected
    assert len(failures) == 3


def test_its_memory_is_counted(lfm2: str) -> None:
    """Keys and values of two layers for each token: 2 heads of 16 numbers in float32; and the convolutions' inputs
    for each seat: 64 numbers of the last 3 tokens."""
    core = engine(lfm2, max_num_seqs=4)
    assert isinstance(core.model, SequentialModel)
    own = core.model.measure()
    assert own.per_token == 2 * 2 * 2 * 16 * 4
    assert own.per_seat == 2 * 3 * 64 * 4
    assert core.info.num_blocks == (16 * 10**6 - 4 * own.per_seat) // (16 * own.per_token)


@pytest.mark.parametrize("knobs", [{"speculative": "ngram"}, {"speculative_model": "here"}])
def test_what_cannot_be_taken_back_is_not_guessed(lfm2: str, knobs: dict[str, Any]) -> None:
    knobs = {name: lfm2 if value == "here" else value for name, value in knobs.items()}
    with pytest.raises(UnsupportedModelError, match=r"--speculative.*no token can be taken back"):
        engine(lfm2, **knobs)


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
    with pytest.raises(UnsupportedModelError, match="attention that is not causal"):
        engine(str(tmp_path))
