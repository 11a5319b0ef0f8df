"""LLM: offline batches, with the default model."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import RepetitionPenaltyLogitsProcessor

from scheduler import LLM, SamplingParams
from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.text.grammar_checker import TOO_MUCH_WORK
from tests.scheduler.test_grammar_checker import chain


@pytest.fixture(scope="module")
def llm(model_path: str) -> LLM:
    return LLM(model_path, dtype="float32")


def test_256_prompts_in_one_call_with_a_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    results = llm.generate(
        [f"{number} plus 1 equals" for number in range(256)], SamplingParams(temperature=0, max_tokens=2)
    )
    assert len(results) == 256
    assert results[1].text.startswith(" 2")
    assert all(result.completions[0].token_ids for result in results)
    shown = capsys.readouterr().err
    assert "256/256" in shown
    assert "tokens/s" in shown
    assert not llm.engine.has_work
    assert llm.engine.pool.num_used == 0


def test_params_can_differ_by_prompt(llm: LLM) -> None:
    short, several = llm.generate(
        ["The capital of France is", "Once upon a time"],
        [SamplingParams(temperature=0, max_tokens=1), SamplingParams(n=3, max_tokens=5, logprobs=1, seed=1)],
        progress=False,
    )
    assert short.text == " Paris"
    assert len({tuple(completion.token_ids) for completion in several.completions}) == 3
    assert all(len(completion.logprobs or []) == len(completion.token_ids) for completion in several.completions)


def test_a_stop_string_ends_its_sequence_only(llm: LLM) -> None:
    stopped, free = llm.generate(
        ["1 2 3 4 5", "1 2 3 4 5"],
        [
            SamplingParams(temperature=0, max_tokens=16, stop=(" 8",)),
            SamplingParams(temperature=0, max_tokens=16),
        ],
        progress=False,
    )
    assert stopped.text == " 6 7"
    assert (stopped.completions[0].finish_reason, stopped.completions[0].stop_reason) == (
        FinishReason.STOP,
        " 8",
    )
    assert free.text.startswith(" 6 7 8 9")


def test_one_bad_prompt_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.generate(["fine", []])
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "form", [GrammarSpec(GrammarKind.REGEX, "(a"), GrammarSpec(GrammarKind.LARK, "start: nowhere")]
)
def test_a_broken_grammar_is_refused_before_anything_runs(llm: LLM, form: GrammarSpec) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="grammar"):
            llm.generate(["fine", "broken"], [SamplingParams(), SamplingParams(grammar=form)], progress=False)
        assert not llm.engine.has_work


def test_a_grammar(llm: LLM) -> None:
    form = GrammarSpec(GrammarKind.REGEX, "(red|green|blue), [0-9]{3}")
    params = SamplingParams(grammar=form, temperature=1.5, max_tokens=20, n=8, seed=0)
    (result,) = llm.generate(["A colour and a number:"], params, progress=False)
    texts = {completion.text for completion in result.completions}
    assert len(texts) > 4
    assert all(re.fullmatch(form.text, text) for text in texts)
    assert {completion.finish_reason for completion in result.completions} == {FinishReason.STOP}
    assert llm.engine.steerings.num_held == 0


def test_a_grammar_that_would_end_the_process_is_refused(llm: LLM) -> None:
    bottomless = GrammarSpec(GrammarKind.LARK, chain("r", 3000, '"x" {}'))
    with pytest.raises(InvalidRequestError, match=TOO_MUCH_WORK):
        llm.generate(["A word:"], SamplingParams(grammar=bottomless), progress=False)
    assert not llm.engine.has_work


def test_a_request_whose_grammar_is_known_joins_the_queue_at_once(llm: LLM) -> None:
    params = SamplingParams(grammar=GrammarSpec(GrammarKind.REGEX, "[a-z]{9}"), max_tokens=20)
    llm.generate(["A word:"], params, progress=False)
    engine = llm.engine
    request = Request(request_id="1", prompt_token_ids=[5, 6], params=params)
    assert engine.add(request) == []
    assert engine.scheduler.num_waiting == 1
    while engine.has_work:
        engine.step()
    (refused,) = engine.add(replace(request, prompt_token_ids=[5] * (engine.info.max_model_len + 1)))
    assert refused.finish_reason is FinishReason.ERROR
    assert engine.steerings.num_held == 0


@pytest.mark.prove
def test_a_grammar_gives_the_same_bits_in_any_company(llm: LLM, model_path: str) -> None:
    """Alone, among 15 others, in chunks, and after preemption, with penalties and biases too."""
    form = GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}, "minItems": 9}')
    held = SamplingParams(
        grammar=form,
        temperature=1.2,
        max_tokens=24,
        seed=4,
        logprobs=2,
        frequency_penalty=0.4,
        logit_bias={33: 2.0},
    )
    free = SamplingParams(temperature=1.0, max_tokens=24, seed=5, ignore_eos=True)
    prompt = "Some numbers, as JSON: "
    others = [f"{number} is a number that " * 8 for number in range(15)]
    (alone,) = llm.generate([prompt], held, progress=False)
    company, *_ = llm.generate([prompt, *others], [held, *[free] * 15], progress=False)
    knobs: dict[str, Any] = {"dtype": "float32", "max_batched_tokens": 16, "max_num_seqs": 16}
    tight = LLM(model_path, **knobs, kv_cache_memory="48MB")
    *_, squeezed = tight.generate([*others, prompt], [*[free] * 15, held], progress=False)
    assert tight.engine.scheduler.pool.num_blocks < 16 * 7, "too few blocks for all"
    assert alone.completions == company.completions == squeezed.completions
    assert json.loads(alone.text + ("]" if alone.completions[0].finish_reason == "length" else ""))


def test_logits_processors_written_in_python(llm: LLM) -> None:
    """transformers' own, which has another idea of what it is given."""
    theirs = RepetitionPenaltyLogitsProcessor(1.4)

    def penalize(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = theirs(torch.tensor([tokens]), logits[None])
        return changed[0]

    prompt, plain = ["Once upon a time"], SamplingParams(temperature=0, max_tokens=24)
    (expected,) = llm.generate(prompt, replace(plain, repetition_penalty=1.4), progress=False)
    (found,) = llm.generate(prompt, plain, logits_processors=[penalize], progress=False)
    (untouched,) = llm.generate(prompt, plain, progress=False)
    assert found.text == expected.text != untouched.text
    assert llm.engine.steerings.num_held == 0
