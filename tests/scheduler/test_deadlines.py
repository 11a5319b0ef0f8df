"""A request is refused for its deadline only if it could not be met whatever becomes of all others."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.request import Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.sequence import Status
from scheduler.features.deadline import least_seconds
from scheduler.features.fair import FairShare
from scheduler.features.step_cost import StepCost
from tests.scheduler.simulation import PRICES
from tests.scheduler.test_scheduler import make_scheduler, request, sampled
from tests.scheduler.test_scheduler_states import RandomGuesses


def bound(scheduler: Scheduler, new: Request, cost: StepCost) -> float:
    return least_seconds(
        new,
        num_cached=scheduler.seating.num_cached_tokens(new),
        block_size=scheduler.pool.block_size,
        most_tokens=scheduler.max_batched_tokens,
        most_gained=scheduler.drafter.most_tokens,
        cost=cost,
    )


def test_a_cached_prompt_and_ones_own_less_urgent_requests_are_no_reason() -> None:
    scheduler = make_scheduler(
        num_blocks=4000, block_size=16, max_num_seqs=4, max_batched_tokens=128, max_model_len=900
    )
    prompt = [index % 50 for index in range(601)]
    scheduler.add(request("first", prompt, 1))
    while scheduler.has_work:
        scheduler.commit(plan := scheduler.schedule(), sampled(plan))
    for number in range(30):
        new = request(str(number), prompt, 100)
        scheduler.add(msgspec.structs.replace(new, priority=5))
    cost = StepCost()
    fresh = bound(scheduler, request("next", list(reversed(prompt)), 100), cost)
    assert bound(scheduler, request("next", prompt, 100), cost) < 0.1 * fresh
    alone = make_scheduler(num_blocks=4000, block_size=16, max_batched_tokens=128, max_model_len=900)
    assert fresh == bound(alone, request("next", list(reversed(prompt)), 100), cost)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32), guesses=st.booleans(), ends=st.sampled_from(["all", "some", "none"]))
def test_the_time_that_is_left_is_never_called_too_short_when_it_is_not(
    seed: int, guesses: bool, ends: str
) -> None:
    """Others end at once, or some do, or none: the request takes at least as long as was said."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=120, max_num_seqs=4, max_batched_tokens=rng.randint(4, 40), policy=FairShare(PRICES)
    )
    if guesses:
        scheduler.drafter = RandomGuesses(seed)
    cost = StepCost()

    def step() -> float:
        plan = scheduler.schedule()
        seconds = cost.predict(plan.num_tokens, plan.attended)
        scheduler.commit(plan, sampled(plan, lambda sequence: 2))
        return seconds

    texts = [[rng.randint(1, 2) for _ in range(60)] for _ in range(2)]
    users = "ab"
    others = []
    for number in range(rng.randint(0, 8)):
        prompt = rng.choice(texts)[: rng.randint(1, 60)]
        other = request(str(number), prompt, rng.randint(1, 20), n=rng.randint(1, 2))
        others.append(msgspec.structs.replace(other, user=rng.choice(users)))
        scheduler.add(others[-1])
        for _ in range(rng.randint(0, 3)):
            if scheduler.has_work:
                step()
    params: dict[str, object] = {"min_tokens": rng.choice([0, 5])} if rng.random() < 0.5 else {"ignore_eos": True}
    if rng.random() < 0.3:
        params["stop_token_ids"] = [2]
    prompt = rng.choice(texts)[: rng.randint(1, 60)]
    new = msgspec.structs.replace(request("new", prompt, rng.randint(5, 20), **params), user=rng.choice(users))
    least = bound(scheduler, new, cost)
    (sequence,) = scheduler.add(new)
    for other in others:
        if ends == "all" or (ends == "some" and rng.random() < 0.5):
            scheduler.abort(other.request_id)
    taken = 0.0
    while sequence.status is not Status.FINISHED:
        taken += step()
    assert least <= taken + 1e-9
