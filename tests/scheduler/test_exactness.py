"""The default model in float32, batched every way there is: token for token what transformers gives alone."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from scheduler.config import EngineConfig
from scheduler.engine.core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import NUM_TOKENS, Reference, check, count_ties, reference
from tests.scheduler.engine_runs import ANY, Preempting, Run, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=0)


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
