"""What steps cost: learned from steps, kept through monotony, and used to cut prompts."""

from __future__ import annotations

import random

import pytest

from scheduler.features.latency_target import MIN_PROMPT_TOKENS, LatencyTarget
from scheduler.features.step_cost import StepCost
from tests.scheduler.test_scheduler import make_scheduler, policy_of, request, run_step


def true_seconds(num_tokens: int, attended: int) -> float:
    return 0.004 + 3e-4 * num_tokens + 4e-8 * attended


def learned(num_steps: int = 300) -> StepCost:
    """After steps of all kinds, whose durations were off by up to a tenth."""
    cost = StepCost()
    rng = random.Random(0)
    for _ in range(num_steps):
        tokens = rng.randint(1, 300)
        attended = tokens * rng.randint(10, 2000)
        cost.observe(tokens, attended, true_seconds(tokens, attended) * rng.uniform(0.9, 1.1))
    return cost


@pytest.mark.parametrize(("num_tokens", "attended"), [(1, 100), (16, 16 * 500), (256, 256 * 1000)])
def test_it_learns_what_steps_cost(num_tokens: int, attended: int) -> None:
    assert learned().predict(num_tokens, attended) == pytest.approx(true_seconds(num_tokens, attended), rel=0.15)


def test_steps_that_only_decode_do_not_unlearn_what_prompts_cost() -> None:
    cost = learned()
    for _ in range(2000):
        cost.observe(16, 16 * 300, true_seconds(16, 16 * 300))
    assert cost.predict(256, 256 * 300) == pytest.approx(true_seconds(256, 256 * 300), rel=0.25)


def test_an_accident_teaches_nothing_unless_it_repeats() -> None:
    cost = learned()
    before = cost.predict(64, 6400)
    cost.observe(64, 6400, 20.0)
    assert cost.predict(64, 6400) == before
    cost.observe(64, 6400, true_seconds(64, 6400))
    assert cost.predict(64, 6400) == pytest.approx(before, rel=0.1)
    for _ in range(300):
        cost.observe(64, 6400, 20.0)
    assert cost.predict(64, 6400) > 5


def test_two_accidents_in_a_row_change_little() -> None:
    cost = learned()
    before = cost.predict(64, 6400)
    for _ in range(2):
        cost.observe(64, 6400, 30.0)
        cost.observe(8, 800, 30.0)
    assert cost.predict(64, 6400) == pytest.approx(before, rel=0.2)
    assert cost.predict(8, 800) == pytest.approx(true_seconds(8, 800), rel=0.5)


def test_a_model_that_is_much_slower_than_was_guessed_is_learned_from_steps_of_every_kind() -> None:
    cost = StepCost()
    for step in range(200):
        num_tokens = 128 if step % 3 == 0 else 1
        cost.observe(num_tokens, 0, 0.1 + 0.02 * num_tokens)
    assert cost.predict(128, 0) == pytest.approx(0.1 + 0.02 * 128, rel=0.2)
    assert cost.predict(1, 0) == pytest.approx(0.12, rel=0.3)


def test_a_chunk_of_the_proposed_size_stays_within_the_time() -> None:
    cost = learned()
    for start in (0, 500, 5000):
        count = cost.prompt_tokens_within(0.08, 16, 16 * 400, start)
        attended = 16 * 400 + count * start + count * count // 2
        assert true_seconds(16 + count, attended) < 0.08
        assert count > 20
    assert cost.prompt_tokens_within(0.002, 16, 16 * 400, 0) == 0


def test_where_tokens_cost_nothing_any_number_of_them_fits() -> None:
    """As it looks on a noisy machine: the shortest steps computed the most tokens."""
    cost = StepCost()
    for num_tokens in range(1, 200):
        cost.observe(num_tokens, 10_000 * num_tokens, 0.1 / num_tokens)
    assert cost.predict(100, 10_000) == cost.predict(1, 1)
    assert cost.prompt_tokens_within(10.0, 16, 16, 0) > 10_000


def test_prompts_are_cut_for_the_streams_and_only_for_them() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=8, max_batched_tokens=2048, max_model_len=4000)
    scheduler.pacing = LatencyTarget(learned(), 0.06, policy_of(scheduler))
    scheduler.add(request("first", 1500, max_tokens=100))
    assert run_step(scheduler).num_tokens == 1500, "nobody streams yet"
    scheduler.add(request("second", 3000, max_tokens=100))
    chunks: list[int] = []
    while scheduler.num_running < 2 or chunks[-1] > 1:
        plan = run_step(scheduler)
        chunks.append(plan.num_tokens - 1)
        assert true_seconds(plan.num_tokens, plan.attended) < 0.06
    assert sum(chunks[:-1]) == 3000
    assert chunks[0] > MIN_PROMPT_TOKENS


def test_prompts_do_not_starve_under_a_target_that_cannot_be_kept() -> None:
    scheduler = make_scheduler(num_blocks=400, max_num_seqs=8, max_batched_tokens=128, max_model_len=400)
    scheduler.pacing = LatencyTarget(learned(), 0.001, policy_of(scheduler))
    scheduler.add(request("first", 10, max_tokens=300))
    run_step(scheduler)
    scheduler.add(request("second", 200, max_tokens=10))
    run_step(scheduler)
    assert run_step(scheduler).num_tokens == 1 + MIN_PROMPT_TOKENS
