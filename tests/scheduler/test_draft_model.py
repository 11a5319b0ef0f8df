"""A draft model: it makes fewer steps, and no bit of any answer is another."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scheduler.config import DEFAULT_MODEL, EngineConfig
from scheduler.engine.core import EngineCore
from scheduler.execution.draft_runner import DraftRunner
from scheduler.llm import LLM
from scheduler.models.files.model_source import ModelNotFoundError
from scheduler.models.model_config import UnsupportedModelError
from scheduler.planning.model_drafts import ModelDrafts
from scheduler.planning.plan import Plan
from scheduler.planning.speculation import Speculation
from scheduler.planning.step_cost import StepCost
from scheduler.request import Request
from scheduler.step import DraftInput
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import ANY, Preempting
from tests.scheduler.test_families import FAMILIES, tiny_model
from tests.scheduler.test_scheduler import make_scheduler, request, run_step
from tests.scheduler.test_speculation import GREEDY, LIST, WISHES, answers


@pytest.fixture(autouse=True)
def _guesses_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens are guessed depends on how long steps take: here it must not depend on the machine."""
    monkeypatch.setattr(StepCost, "observe", lambda *_: None)


def free(core: EngineCore) -> EngineCore:
    """A draft model that costs nothing is asked for as much as there may be."""
    core.draft_cost.estimate *= 0
    return core


class Watcher:
    """Counts what a draft model was asked and what came of it."""

    def __init__(self, core: EngineCore) -> None:
        self.asked: list[DraftInput] = []
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_steps = 0
        core.observers.append(self)

    def step(self, plan: Plan, started: float, stats: Any, ended: object) -> None:
        self.asked += plan.asked.values()
        self.num_steps += 1
        for draft in stats.drafts:
            if draft.kind == "model":
                self.num_drafted += draft.num_drafted
                self.num_accepted += draft.num_accepted


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.prove
def test_the_target_as_its_own_draft_is_always_right(dtype: str) -> None:
    """Alone, among others, chunked and preempted; with and without guesses from the text."""
    knobs: dict[str, Any] = {"dtype": dtype, "longest_step_ms": ANY}
    drafting: dict[str, Any] = {**knobs, "speculative_model": DEFAULT_MODEL, "kv_cache_memory": "256MB"}
    expected = answers(LLM(speculative="off", **knobs))
    llm = LLM(speculative="off", **drafting)
    free(llm.engine)
    assert answers(llm, alone=True) == expected
    both = LLM(speculative="ngram", max_batched_tokens=32, **drafting)
    free(both.engine)
    assert answers(both) == expected
    few: dict[str, Any] = {**drafting, "kv_cache_memory": "16MB"}
    crowded = LLM(speculative="off", max_model_len=160, prefix_caching=False, **few)
    preempting = Preempting(free(crowded.engine))
    assert answers(crowded) == expected
    assert len(preempting.victims) > len(WISHES)
    # It does not know what a penalty, a grammar or a stop string makes of the logits; the rest it knows exactly.
    unsteered = Watcher(llm.engine)
    for params in WISHES[:3]:
        llm.generate([LIST, "The sun is"], params, progress=False)
    assert unsteered.num_drafted == unsteered.num_accepted > 100
    assert unsteered.num_steps < 40
    assert llm.engine.pool.num_used == 0


def test_what_it_knows_of_a_cached_prefix_is_found_again() -> None:
    llm = LLM(speculative="off", speculative_model=DEFAULT_MODEL, kv_cache_memory="128MB")
    watcher = Watcher(free(llm.engine))
    prompt = llm.tokenizer.encode(LIST * 8)
    params = msgspec.structs.replace(GREEDY, max_tokens=40)
    (first,) = llm.generate([prompt], params, progress=False)
    assert watcher.asked[0].start == 0
    watcher.asked.clear()
    llm.generate([prompt + first.completions[0].token_ids + prompt[:5]], params, progress=False)
    size = llm.engine.pool.block_size
    assert watcher.asked[0].start >= (len(prompt) + 40) // size * size - 2 * size


def test_it_reads_a_long_prompt_where_much_is_left_to_guess_and_only_as_far_as_the_step_may_take() -> None:
    llm = LLM(speculative="off", speculative_model=DEFAULT_MODEL, kv_cache_memory="128MB", longest_step_ms=ANY)
    watcher = Watcher(free(llm.engine))
    prompt = llm.tokenizer.encode(LIST * 30)[:600]
    llm.generate([prompt], msgspec.structs.replace(GREEDY, max_tokens=60, ignore_eos=True), progress=False)
    assert watcher.num_drafted > 0
    watcher.asked.clear()
    llm.generate([prompt[1:]], msgspec.structs.replace(GREEDY, max_tokens=30, ignore_eos=True), progress=False)
    assert not watcher.asked, "20 tokens would be read for each that is left"


def test_what_it_reads_is_part_of_the_step() -> None:
    class Reading(StepCost):
        def predict(self, num_tokens: float, attended: float) -> float:
            return 1e-4 * num_tokens

    drafts = Speculation(None, ModelDrafts(StepCost(), Reading(), 16))
    scheduler = make_scheduler(num_blocks=500, block_size=16, max_batched_tokens=512, max_model_len=2000)
    scheduler.add(request("long", 300, 200))
    run_step(scheduler)
    for longest, is_asked in ((0.015, False), (math.inf, True)):
        plan = scheduler.schedule()
        drafts.draft(plan, 100, scheduler.seating.reserve, longest)
        assert bool(plan.asked) == is_asked


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-neox"])
def test_through_transformers_modules(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    model = tiny_model(name, **changes)
    model.save_pretrained(tmp_path)
    _tokenizer_into(tmp_path)
    prompt = [(5 * place) % 150 + 10 for place in range(40)]
    expected = reference(model, prompt, 24)
    config = EngineConfig(
        dtype="float32", fused=False, speculative="off", speculative_model=str(tmp_path), kv_cache_memory="8MB"
    )
    core = free(EngineCore(config, str(tmp_path)))
    watcher = Watcher(core)
    for number in range(3):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=GREEDY))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(3)}
    while core.has_work:
        for output in core.step().outputs:
            tokens[output.request_id] += output.token_ids
    assert count_ties(list(tokens.values()), [expected] * 3) == 0
    assert watcher.num_accepted >= 30
    assert core.pool.num_used == 0


def _tokenizer_into(folder: Path, *more: str) -> None:
    """A tokenizer of words, and with some `more` of them."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *"abcdefgh", *more])}
    definition = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_one_of_another_vocabulary_is_refused_with_the_reason(tmp_path: Path) -> None:
    folders = [tmp_path / "target", tmp_path / "draft"]
    for folder, more in zip(folders, ((), ("i",)), strict=True):
        name, changes = FAMILIES["llama"]
        tiny_model(name, **changes).save_pretrained(folder)
        _tokenizer_into(folder, *more)
    config = EngineConfig(dtype="float32", speculative_model=str(folders[1]), kv_cache_memory="8MB")
    with pytest.raises(UnsupportedModelError, match="of its 10 tokens 9 have the same number among the 9 there"):
        EngineCore(config, str(folders[0]))
    with pytest.raises(ModelNotFoundError, match="--speculative-model nowhere: no such file"):
        LLM(speculative_model="nowhere")


def test_one_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, changes = FAMILIES["llama"]
    tiny_model(name, **changes).save_pretrained(tmp_path)
    _tokenizer_into(tmp_path)
    config = EngineConfig(dtype="float32", speculative_model=str(tmp_path), kv_cache_memory="8MB")
    core = free(EngineCore(config, str(tmp_path)))
    watcher = Watcher(core)
    monkeypatch.setattr(DraftRunner, "draft", lambda *_: 1 // 0)
    core.add(Request(request_id="a", prompt_token_ids=[5] * 20, params=GREEDY))
    num_tokens = 0
    with caplog.at_level(logging.ERROR):
        while core.has_work:
            num_tokens += sum(len(output.token_ids) for output in core.step().outputs)
    assert num_tokens == 24
    assert len(watcher.asked) == 1, "nothing is asked of it, and no room made, once it is gone"
    assert watcher.num_drafted == 0
    assert "going on without it" in caplog.text
