"""Sequences take turns where a step of all would be long, and nobody is forgotten."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.request import Request
from scheduler.core.sequence import Sequence
from scheduler.features.fair import FairShare
from scheduler.features.leftovers import Leftovers
from scheduler.features.priority_class import CLASS_DISTANCE
from scheduler.features.rotation import Rotation
from scheduler.features.step_cost import StepCost
from scheduler.features.turns import Turns
from scheduler.sampling_params import SamplingParams
from tests.scheduler.test_fair import PRICES, Users, fair_scheduler
from tests.scheduler.test_scheduler import make_scheduler, policy_of, sampled


def cost_of(per_token: float) -> StepCost:
    """What has seen enough steps to know that each of their tokens takes so long."""
    cost = StepCost()
    for _ in range(300):
        for num_tokens in (1, 8, 64):
            cost.observe(num_tokens, 0, per_token * num_tokens)
    return cost


@pytest.mark.parametrize("per_token, parts", [(0.0001, 1), (0.001, 2), (0.002, 3)])
def test_a_long_step_is_divided(per_token: float, parts: int) -> None:
    scheduler = make_scheduler(max_num_seqs=64, max_batched_tokens=128, num_blocks=3000, max_model_len=600)
    params = SamplingParams(max_tokens=100, seed=0)
    for index in range(64):
        scheduler.add(Request(request_id=str(index), prompt_token_ids=[1, 2], params=params))
    plan = scheduler.schedule()
    scheduler.commit(plan, sampled(plan))
    scheduler.pacing = Turns(cost_of(per_token), 0.04, policy_of(scheduler))
    decoded: Counter[str] = Counter()
    for _ in range(10 * parts):
        plan = scheduler.schedule()
        assert abs(len(plan.chunks) - 64 / parts) <= 1
        decoded.update(chunk.sequence.request.request_id for chunk in plan.chunks if chunk.samples)
        scheduler.commit(plan, sampled(plan))
    assert len(decoded) == 64
    assert max(decoded.values()) - min(decoded.values()) <= 1


def test_who_has_one_stream_decodes_in_each_step_beside_anothers_many() -> None:
    scheduler = make_scheduler(max_num_seqs=64, max_batched_tokens=128, num_blocks=3000, max_model_len=600)
    params = SamplingParams(max_tokens=100, seed=0)
    for index in range(64):
        user = "one" if index == 40 else "many"
        scheduler.add(Request(request_id=str(index), user=user, prompt_token_ids=[1, 2], params=params))
    scheduler.commit(plan := scheduler.schedule(), sampled(plan))
    scheduler.pacing = Turns(cost_of(0.002), 0.04, policy_of(scheduler))
    decoded: Counter[str] = Counter()
    for _ in range(30):
        plan = scheduler.schedule()
        decoded.update(chunk.sequence.request.request_id for chunk in plan.chunks)
        scheduler.commit(plan, sampled(plan))
    assert decoded.pop("40") == 30
    assert max(decoded.values()) - min(decoded.values()) <= 1


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=6, max_size=6),
    size=st.integers(1, 12),
)
def test_each_user_has_a_part_of_each_turn_and_nobody_is_forgotten(
    counts: list[int], weights: list[float], size: int
) -> None:
    params = SamplingParams(max_tokens=9)
    sequences = [
        Sequence(
            Request(
                request_id=f"{user} {number}",
                prompt_token_ids=[1],
                params=params,
                user=str(user),
                weight=weights[user],
            )
        )
        for user, count in enumerate(counts)
        for number in range(count)
    ]
    rotation = Rotation()
    served: Counter[Sequence] = Counter()
    total = sum(weights[: len(counts)])
    for _ in range(400):
        turn = rotation.next(sequences, size)
        assert len(turn) == len(set(turn)) == min(size, len(sequences))
        of_user = Counter(int(sequence.request.user) for sequence in turn)
        for user, count in enumerate(counts):
            if size >= len(counts):
                part = 1 + math.floor(weights[user] / total * (size - len(counts)))
                assert of_user[user] >= min(count, part)
        served.update(turn)
    assert len(served) == len(sequences)
    for user in range(len(counts)):
        own = [served[sequence] for sequence in sequences if sequence.request.user == str(user)]
        assert max(own) - min(own) <= 1


def test_prompts_beside_streams_get_smaller_chunks() -> None:
    scheduler = make_scheduler(max_num_seqs=8, max_batched_tokens=128, num_blocks=3000, max_model_len=600)
    scheduler.pacing = Turns(cost_of(0.001), 0.04, policy_of(scheduler))
    params = SamplingParams(max_tokens=100, seed=0)
    scheduler.add(Request(request_id="alone", prompt_token_ids=[1] * 128, params=params))
    plan = scheduler.schedule()
    assert plan.num_tokens == 128, "nobody streams yet"
    scheduler.commit(plan, sampled(plan))
    scheduler.add(Request(request_id="long", prompt_token_ids=[2] * 400, params=params))
    plan = scheduler.schedule()
    assert plan.num_tokens == pytest.approx(40, abs=1)
    assert len(plan.chunks) == 2


def test_a_few_streams_all_decode_beside_long_prompts() -> None:
    scheduler = make_scheduler(max_num_seqs=12, max_batched_tokens=128, num_blocks=9000, max_model_len=6000)
    params = SamplingParams(max_tokens=100, seed=0)
    for index in range(8):
        scheduler.add(Request(request_id=str(index), prompt_token_ids=[index] * 4, params=params))
    scheduler.commit(plan := scheduler.schedule(), sampled(plan))
    scheduler.pacing = Turns(cost_of(0.001), 0.04, policy_of(scheduler))
    for index in range(4):
        scheduler.add(Request(request_id=f"long {index}", prompt_token_ids=[index] * 4000, params=params))
    for _ in range(20):
        plan = scheduler.schedule()
        assert sum(chunk.samples for chunk in plan.chunks) == 8
        assert plan.num_tokens == pytest.approx(40, abs=4)
        scheduler.commit(plan, sampled(plan))


def test_who_gets_leftovers_leaves_room_for_whoever_comes_and_most_of_a_step_to_whoever_is_there() -> None:
    policy = FairShare(PRICES, leftovers=Leftovers(cost_of(0.001), 0.04))
    users = Users(fair_scheduler(seats=64, budget=256, policy=policy))
    users.scheduler.pacing = Turns(cost_of(0.001), 0.04, policy_of(users.scheduler))
    users.send("batch", 4, 300, count=60, priority=CLASS_DISTANCE)
    for _ in range(20):
        users.step()
    for _ in range(80):
        assert users.step().num_tokens <= 24, "a guest could come at any time"
    assert len(users.seats) == 1
    users.send("guest", 20, 50)
    users.send("guest", 300, 50)
    users.step()
    before = Counter({key: each.num_computed_tokens for key, each in users.scheduler.running.items()})
    while users.live["guest"]:
        plan = users.step()
        of_batch = [chunk.length for chunk in plan.chunks if chunk.sequence.request.user == "batch"]
        assert sum(of_batch) <= 8
    gained = {each.num_computed_tokens - before[key] for key, each in users.scheduler.running.items()}
    assert max(gained) - min(gained) <= 1, "they take turns"
    assert max(gained) <= 2, "and have a small part of the time"
    users.send("batch", 500, 10, priority=CLASS_DISTANCE)
    for _ in range(300):
        users.step()
    assert users.live["batch"] < 61
