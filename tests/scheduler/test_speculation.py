"""Guessed tokens: fewer steps, and not a bit of any answer is another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scheduler.config import EngineConfig
from scheduler.core.plan import Chunk, Plan
from scheduler.core.request import Request
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.core.sequence import Lease, Sequence, Status
from scheduler.features.ngram import Match, NgramIndex
from scheduler.features.speculation import Speculation
from scheduler.features.step_cost import StepCost
from scheduler.features.text_drafts import TextDrafts
from scheduler.llm import LLM, Completion
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.conftest import count_ties, reference
from tests.scheduler.engine_runs import ANY, Preempting
from tests.scheduler.test_families import FAMILIES, tiny_model
from tests.scheduler.test_scheduler import request

LIST = "apple, pear, plum, cherry, apple, pear, plum, cherry, apple, pear,"
CODE = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n    return"

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=0)
PLAIN = SamplingParams(temperature=0, max_tokens=32, seed=3, logprobs=2)
WISHES = [
    PLAIN,
    msgspec.structs.replace(PLAIN, temperature=0.7),
    msgspec.structs.replace(PLAIN, temperature=1.2, top_p=0.9, n=2),
    msgspec.structs.replace(PLAIN, repetition_penalty=1.1, frequency_penalty=0.3, min_tokens=24),
    msgspec.structs.replace(PLAIN, stop=("cherry, apple", "\n\n")),
    msgspec.structs.replace(PLAIN, grammar=GrammarSpec(GrammarKind.REGEX, r"( (apple|pear|plum),)+\.")),
]
FORCING = GrammarSpec(
    GrammarKind.REGEX, r" (Yes|No), the list has (apples|pears) in it, and there is no end to it\."
)


def num_drafted(plan: Plan) -> int:
    """Guesses that a step computes."""
    return sum(len(chunk.drafted) for chunk in plan.chunks)


@pytest.fixture(autouse=True)
def _costs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens are guessed depends on how long steps take: here it must not depend on the machine."""
    monkeypatch.setattr(StepCost, "observe", lambda *_: None)


def answers(llm: LLM, *, alone: bool = False) -> list[list[Completion]]:
    """Texts, tokens and logprobs."""
    pairs = [(prompt, params) for prompt in (LIST, CODE) for params in WISHES]
    if alone:
        return [llm.generate([prompt], params, progress=False)[0].completions for prompt, params in pairs]
    prompts, params = zip(*pairs, strict=True)
    return [result.completions for result in llm.generate(prompts, params, progress=False)]


def counted(core: EngineCore) -> list[tuple[int, int]]:
    """By step: tokens guessed, and those that were right. Filled as the engine runs."""
    counts: list[tuple[int, int]] = []

    class Counter:
        def step(self, plan: Plan, started: float, stats: Any, ended: object) -> None:
            counts.append((stats.num_drafted, stats.num_accepted))

    core.observers.append(Counter())
    return counts


@pytest.fixture(
    scope="module",
    params=["auto", *(pytest.param(dtype, marks=pytest.mark.prove) for dtype in ("bfloat16", "float32"))],
)
def knobs(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    yield {"dtype": request.param, "longest_step_ms": ANY}


def test_the_same_bits_alone_among_others_and_preempted(knobs: dict[str, Any]) -> None:
    expected = answers(LLM(speculative="off", **knobs))
    llm = LLM(speculative="ngram", **knobs)
    counts = counted(llm.engine)
    assert answers(llm, alone=True) == expected
    assert sum(right for _, right in counts) > 50
    assert answers(llm) == expected
    crowded = LLM(speculative="ngram", kv_cache_memory="8MB", max_model_len=160, prefix_caching=False, **knobs)
    preempting = Preempting(crowded.engine)
    counts = counted(crowded.engine)
    assert answers(crowded) == expected
    assert sum(right for _, right in counts) > 0
    assert len(preempting.victims) > len(WISHES)


def chunk_of(name: str, tokens: list[int], prediction: list[int] | None = None) -> Chunk:
    """A sequence that is about to decode."""
    sequence = Sequence(msgspec.structs.replace(request(name, tokens, 100), prediction=prediction or []))
    sequence.lease, sequence.status = Lease(0, 0, [], []), Status.RUNNING
    sequence.num_computed_tokens = len(tokens) - 1
    return Chunk.of(sequence, 1)


def test_guesses_are_many_where_they_are_right_and_end_where_they_are_not() -> None:
    speculation = Speculation(TextDrafts(StepCost()))
    chunk = chunk_of("a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2)

    def num_guesses() -> int:
        plan = Plan([chunk])
        speculation.draft(plan, 100, lambda *_: True)
        return num_drafted(plan)

    first = num_guesses()
    assert first > 0
    for _ in range(5):
        plan = Plan([chunk])
        speculation.draft(plan, 100, lambda *_: True)
        assert plan.chunks[0].drafted == tuple(([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2)[: num_drafted(plan)])
        speculation.learn(plan.chunks[0], num_drafted(plan) + 1, plan.stretch, [])
    assert num_guesses() > first
    for _ in range(40):
        plan = Plan([chunk])
        speculation.draft(plan, 100, lambda *_: True)
        speculation.learn(plan.chunks[0], 1, plan.stretch, [])
    assert num_guesses() <= 1


def grown(chunk: Chunk, tokens: list[int]) -> Chunk:
    """The chunk's sequence with more tokens of its answer, about to compute the last of them."""
    sequence = chunk.sequence
    for token in tokens:
        sequence.append(token)
    sequence.num_computed_tokens = sequence.num_tokens - 1
    return Chunk.of(sequence, 1)


def guesses(speculation: Speculation, chunk: Chunk) -> list[int]:
    plan = Plan([chunk])
    speculation.draft(plan, 2, lambda *_: True)
    return list(plan.chunks[0].drafted)


def test_guesses_follow_the_text_as_it_grows() -> None:
    speculation = Speculation(TextDrafts(StepCost()))
    chunk = chunk_of("a", [1, 2, 3, 4, 5, 6, 7, 8])
    assert guesses(speculation, chunk) == []
    for tokens, expected in (([2, 3], [4, 5]), ([9], []), ([6, 7], [8, 2]), ([2, 3], [9, 6])):
        chunk = grown(chunk, tokens)
        assert guesses(speculation, chunk) == expected


def test_what_the_client_expects_is_guessed_first() -> None:
    speculation = Speculation(TextDrafts(StepCost()))
    chunk = chunk_of("a", [50, 51, 52], prediction=[1, 2, 3, 4, 5, 6, 7, 8])
    assert guesses(speculation, chunk) == [1, 2]
    chunk = grown(chunk, [1, 2, 9])
    assert guesses(speculation, chunk) == []
    assert guesses(speculation, grown(chunk, [5, 6])) == [7, 8]


def test_no_guess_without_blocks_to_spare_nor_beyond_the_budget() -> None:
    speculation = Speculation(TextDrafts(StepCost()))
    plan = Plan([chunk_of("a", [1, 2, 3, 4] * 4)])
    speculation.draft(plan, 100, lambda *_: False)
    assert num_drafted(plan) == 0
    speculation.draft(plan, 2, lambda *_: True)
    assert num_drafted(plan) == 2


def test_nobody_waits_for_the_guesses_of_others() -> None:
    """One repeats itself beside three that do not: the step is hardly longer than without guesses."""
    cost = StepCost()
    speculation = Speculation(TextDrafts(cost))
    plan = Plan([chunk_of("a", [1, 2, 3, 4] * 4), *(chunk_of(name, [5, 6, 7]) for name in "bcd")])
    for _ in range(60):  # by now it is known what each gains
        speculation.draft(plan, 100, lambda *_: True)
        for chunk in plan.chunks:
            speculation.learn(chunk, len(chunk.drafted) + 1, plan.stretch, [])
        plan = Plan([chunk._replace(drafted=()) for chunk in plan.chunks])
    before = cost.predict(plan.num_tokens, plan.attended)
    speculation.draft(plan, 100, lambda *_: True)
    assert cost.predict(plan.num_tokens, plan.attended) <= 1.1 * before


def test_who_is_ahead_can_wait_for_the_guesses_of_others() -> None:
    """One repeats itself, and the other does not any more, but has gained before: as long as that lasts."""
    speculation = Speculation(TextDrafts(StepCost()))
    chunks = [chunk_of("a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2), chunk_of("b", [5, 6, 7])]

    def num_guesses() -> int:
        plan = Plan(list(chunks))
        speculation.draft(plan, 100, lambda *_: True)
        for chunk in plan.chunks:
            speculation.learn(chunk, len(chunk.drafted) + 1, plan.stretch, [])
        return num_drafted(plan)

    few = [num_guesses() for _ in range(60)][-1]
    speculation.learn(chunks[1], 3, 1.0, [])
    counts = [num_guesses() for _ in range(60)]
    assert counts[0] > 3 * few
    assert counts[-1] == few


class Known(StepCost):
    """Of steps whose cost is known, in seconds."""

    def __init__(self, fixed: float, per_token: float) -> None:
        super().__init__()
        self._known = fixed, per_token

    def predict(self, num_tokens: float, attended: float) -> float:
        fixed, per_token = self._known
        return fixed + per_token * num_tokens


@pytest.mark.parametrize(("fixed", "pays"), [(6e-3, False), (40e-3, True)])
def test_nobody_looks_for_guesses_that_could_not_pay(
    monkeypatch: pytest.MonkeyPatch, fixed: float, pays: bool
) -> None:
    """To look takes time in every step: 32 sequences that repeat themselves, where a row more costs the step about
    as much as one of the others, and where it costs little."""
    looked = []
    match = NgramIndex.match

    def spied(index: NgramIndex, tokens: list[int]) -> Match | None:
        looked.append(len(tokens))
        return match(index, tokens)

    monkeypatch.setattr(NgramIndex, "match", spied)
    speculation = Speculation(TextDrafts(Known(fixed, 1e-3)))
    plan = Plan([chunk_of(f"{number}", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2) for number in range(32)])
    speculation.draft(plan, 100, lambda *_: True)
    assert (len(looked), num_drafted(plan) > 0) == ((32, True) if pays else (0, False))
    for chunk in plan.chunks:
        speculation.learn(chunk, 1, plan.stretch, [7, 8])
    plan = Plan([chunk._replace(drafted=()) for chunk in plan.chunks])
    speculation.draft(plan, 100, lambda *_: True)
    assert num_drafted(plan) > 0, "what a grammar forces is nearly always right"


def test_where_all_repeat_themselves_all_are_guessed_for() -> None:
    """Though the guesses for one of them are the likeliest, and the others got nothing of late."""
    cost = StepCost()
    cost.estimate = np.array([4e-3, 7e-4, 1e-6])
    speculation = Speculation(TextDrafts(cost))
    plan = Plan([chunk_of(name, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2) for name in "abcdefgh"])
    speculation.draft(Plan(list(plan.chunks)), 100, lambda *_: True)
    for _ in range(60):
        alone = Plan(plan.chunks[:1])
        speculation.draft(alone, 100, lambda *_: True)
        speculation.learn(alone.chunks[0], num_drafted(alone) + 1, alone.stretch, [])
        for chunk in plan.chunks[1:]:
            speculation.learn(chunk, 1, alone.stretch, [])
    speculation.draft(plan, 100, lambda *_: True)
    assert min(len(chunk.drafted) for chunk in plan.chunks) >= 1


def test_what_a_grammar_forces_is_guessed_for_as_long_as_it_forces() -> None:
    speculation = Speculation(TextDrafts(StepCost()))
    plan = Plan([chunk_of("a", [1, 2, 3, 4, 5])])
    speculation.learn(plan.chunks[0], 1, 1.0, [7, 8, 9])
    speculation.draft(plan, 100, lambda *_: True)
    assert (plan.chunks[0].drafted, plan.chunks[0].draft_kind) == ((7, 8, 9), "grammar")
    speculation.learn(plan.chunks[0], 3, plan.stretch, [])
    assert guesses(speculation, chunk_of("a", [1, 2, 3, 4, 5, 7, 8, 9])) == []


def test_what_a_grammar_forces_takes_few_steps_and_changes_nothing(model_path: str) -> None:
    params = msgspec.structs.replace(PLAIN, temperature=0.7, grammar=FORCING)
    (expected,) = LLM(model_path, speculative="off").generate([LIST], params, progress=False)
    llm = LLM(model_path, speculative="ngram")
    counts = counted(llm.engine)
    (found,) = llm.generate([LIST], params, progress=False)
    assert found.completions == expected.completions
    num_right = sum(right for _, right in counts)
    assert num_right == sum(guessed for guessed, _ in counts) >= 10
    assert len(counts) == len(expected.completions[0].token_ids) - num_right


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt-neox", "olmo2"])
def test_guesses_through_transformers_modules(family: str, tmp_path: Path) -> None:
    """Half of what the client expects is right: the tokens are transformers' own all the same, in fewer steps."""
    name, changes = FAMILIES[family]
    model = tiny_model(name, **changes)
    model.save_pretrained(tmp_path)
    prompt = [(5 * place) % 150 + 10 for place in range(40)]
    expected = reference(model, prompt, 24)
    core = EngineCore(
        EngineConfig(dtype="float32", fused=False, speculative="ngram", kv_cache_memory="8MB"), str(tmp_path)
    )
    prediction = [*expected.tokens[:11], 7, *expected.tokens[12:]]
    steps = counted(core)
    for number in range(3):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=GREEDY, prediction=prediction))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(3)}
    while core.has_work:
        for output in core.step().outputs:
            tokens[output.request_id] += output.token_ids
    assert count_ties(list(tokens.values()), [expected] * 3) == 0
    assert sum(right for _, right in steps) >= 20
    assert core.pool.num_used == 0
