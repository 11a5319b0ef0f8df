"""The default model in float32, batched every way there is: token for token what transformers gives alone."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scheduler.config import EngineConfig
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer
from tests.conftest import ALICE, NUM_TOKENS, Reference, count_ties, reference
from tests.scheduler.engine_runs import ANY, Preempting, Run, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=0)


@torch.inference_mode()
def check(model: PreTrainedModel, prompt: list[int], guess: list[int]) -> Reference:
    """The model's own greedy continuation, as long as `guess`. One pass tells all of a guess that is right; after
    a token that is wrong the model goes on from its own."""
    tokens: list[int] = []
    margins: list[float] = []
    while len(tokens) < len(guess):
        text = torch.tensor([prompt + tokens + guess[len(tokens) : -1]], device=model.device)
        logits = model(text, use_cache=False, logits_to_keep=len(guess) - len(tokens)).logits[0]
        best = logits.float().topk(2, dim=-1)
        for token, (first, second) in zip(best.indices[:, 0].tolist(), best.values.tolist(), strict=True):
            tokens.append(token)
            margins.append(first - second)
            if token != guess[len(tokens) - 1]:
                break
    return Reference(tokens, margins)


@pytest.fixture(scope="module")
def prompts(model_path: str) -> list[list[int]]:
    """24 prompts of 3 to 600 tokens, cut out of a book, no two alike."""
    book = Tokenizer(model_path).encode(ALICE)
    rng = random.Random(0)
    lengths = [3, 600, *(round(3 * 200 ** rng.random()) for _ in range(22))]
    starts = [rng.randrange(len(book) - 600) for _ in lengths]
    return [book[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def together(model_path: str, prompts: list[list[int]]) -> Run:
    """What we answer to all prompts at once, in float32."""
    return run_all(EngineCore(EngineConfig(dtype="float32"), model_path), prompts, GREEDY)


@pytest.fixture(scope="module")
def references(float32_path: str, prompts: list[list[int]], together: Run) -> list[Reference]:
    """What transformers answers to each prompt alone, in float32."""
    model = AutoModelForCausalLM.from_pretrained(float32_path, dtype="float32")
    return [check(model, prompt, guess) for prompt, guess in zip(prompts, together.tokens, strict=True)]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> object:
    """Print the number of forgiven ties even where pytest hides output."""

    def _report(ties: int) -> None:
        with capsys.disabled():
            print(f" [{request.node.name}: {ties} ties forgiven] ", end="")

    return _report


@pytest.mark.parametrize("wrong", [(), (0,), (5, 6, 17), (23,)])
def test_what_is_checked_is_what_transformers_generates(wrong: tuple[int, ...], tiny_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32")
    expected = reference(model, [5, 6, 7], NUM_TOKENS)
    guess = [token + (place in wrong) for place, token in enumerate(expected.tokens)]
    checked = check(model, [5, 6, 7], guess)
    assert checked.tokens == expected.tokens
    assert checked.margins == pytest.approx(expected.margins, abs=1e-5)


def test_prompts_together(together: Run, references: list[Reference], report: object) -> None:
    report(count_ties(together.tokens, references))  # type: ignore[operator]


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"prefix_caching": False}, id="without-prefix-caching", marks=pytest.mark.prove),
        pytest.param({"max_batched_tokens": 16}, id="budget-of-16-tokens"),
        pytest.param({"fused": False}, id="through-transformers-modules", marks=pytest.mark.prove),
        pytest.param(
            {"fused": False, "attention_backend": "torch"}, id="with-torch-attention", marks=pytest.mark.prove
        ),
    ],
)
def test_prompts_together_otherwise(
    knobs: dict[str, object],
    model_path: str,
    prompts: list[list[int]],
    references: list[Reference],
    report: object,
) -> None:
    core = EngineCore(EngineConfig(dtype="float32", **knobs), model_path)
    if core.scheduler.max_batched_tokens < len(prompts):  # they take turns, and their time
        prompts, references = prompts[:12], references[:12]
    run = run_all(core, prompts, GREEDY)
    assert max(step.num_tokens for step in run.steps) <= core.scheduler.max_batched_tokens
    report(count_ties(run.tokens, references))  # type: ignore[operator]


def test_with_preemptions_in_a_small_pool(
    model_path: str, prompts: list[list[int]], references: list[Reference], report: object
) -> None:
    knobs = {"kv_cache_memory": "40MB", "max_model_len": 700, "longest_step_ms": ANY, "prefix_caching": False}
    core = EngineCore(EngineConfig(dtype="float32", **knobs), model_path)
    preempting = Preempting(core)
    run = run_all(core, prompts[:8], GREEDY)
    assert len(preempting.victims) == 8
    report(count_ties(run.tokens, references[:8]))  # type: ignore[operator]


def test_prompts_that_share_a_long_prefix(
    model_path: str, prompts: list[list[int]], references: list[Reference], report: object
) -> None:
    core = EngineCore(EngineConfig(dtype="float32"), model_path)
    run_all(core, [prompts[1]], SamplingParams(temperature=0, max_tokens=1, seed=0), name="first")
    longest, expected = prompts[1], references[1]
    # Each goes a little further along the reference's own continuation, so that one reference serves them all.
    shared = [longest + expected.tokens[:extra] for extra in range(0, 24, 4)]
    run = run_all(core, shared, GREEDY)
    assert run.num_cached_tokens >= len(shared) * (len(longest) // 16 - 1) * 16
    ours = [tokens[: NUM_TOKENS - extra] for tokens, extra in zip(run.tokens, range(0, 24, 4), strict=True)]
    wanted = [Reference(expected.tokens[extra:], expected.margins[extra:]) for extra in range(0, 24, 4)]
    report(count_ties(ours, wanted))  # type: ignore[operator]
