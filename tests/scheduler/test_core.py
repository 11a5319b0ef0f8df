"""The core by itself: the default of every seam, plain torch, and a model through transformers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from scheduler import LLM, SamplingParams
from scheduler.core.__main__ import engine_of
from scheduler.core.attention import TorchAttention
from scheduler.core.request import Request
from scheduler.core.transformers_model import TransformersModel

TIE = 1e-4
"""Logits that are no further apart may come out either way, in float32."""

NUM_TOKENS = 12
PROMPTS = [
    *(f"{number} plus {number} equals" for number in range(8)),
    *(f"The capital of {country} is" for country in ("France", "Italy", "Japan", "Peru")),
    *("Once upon a time", "def fibonacci(n):", "The sea is", "My favourite colour", "1, 2, 3, 4,"),
    *("Dear Sir or Madam,", "To be or not to be", "In the year 1969, " * 20),
]
MAIN = (sys.executable, "-m", "scheduler.core")


def test_greedy_tokens_are_those_of_the_other_ways_to_run_a_model(model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=2)
    with LLM(model_path, dtype="float32", fused=False) as llm:
        expected = llm.generate(PROMPTS, params, progress=False)
    engine = engine_of(TransformersModel(model_path), 256, tokenizer.eos_token_id, TorchAttention())
    sequences = []
    for number, result in enumerate(expected):
        asked = Request(request_id=str(number), prompt_token_ids=result.prompt_token_ids, params=params)
        sequences += engine.add(asked)
    most = 0
    while engine.scheduler.has_work:
        most = max(most, len(engine.step()))
    assert most == len(PROMPTS) == 20, "they are computed together"
    for sequence, result in zip(sequences, expected, strict=True):
        (completion,) = result.completions
        tokens = sequence.token_ids[sequence.num_prompt_tokens :]
        for token, right, likeliest in zip(tokens, completion.token_ids, completion.logprobs or [], strict=True):
            if token != right:
                (_, first), (_, second) = likeliest.top
                assert first - second < TIE
                break


def test_it_prints_a_batch_of_answers(model_path: str) -> None:
    asked = ("The capital of France is", "1 2 3 4")
    done = subprocess.run(
        (*MAIN, *asked, "--raw", "--max-tokens", "4", "--model", model_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("> The capital of France is\n Paris.")
    assert "> 1 2 3 4\n 5 6" in done.stdout


def test_without_a_model_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run((*MAIN, "hello", "--model", tmp_path), check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "run `carousel serve` once, or give --model" in done.stderr


@pytest.mark.parametrize("module", ["scheduler", "plan", "seating", "blocks", "policy", "request", "step"])
def test_planning_needs_no_torch(module: str) -> None:
    seen = subprocess.run(
        (sys.executable, "-c", f"import sys, scheduler.core.{module}; print('torch' in sys.modules)"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "False\n"
