"""Fairness where seats and blocks are both scarce, in a simulation: the scheduler plans, and nothing is computed.

16 users send two requests each, of 2,000 tokens of prompt and 1,000 of answer, to 8 seats and a step of 128 tokens
at most. A step takes 2 ms, and 0.4 ms a token.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from scheduler.core.blocks import BlockPool
from scheduler.core.request import Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.step import NOTHING, ChunkResult, SampledToken
from scheduler.features.accounts import MIN_TURN, QUANTUM
from scheduler.features.fair import FairShare
from scheduler.features.giving_way import GivingWay
from scheduler.features.prices import Prices
from scheduler.features.recomputation import SHARE
from scheduler.features.sharing_policy import ArrivalOrder, SharingPolicy
from scheduler.sampling_params import SamplingParams

USERS, REQUESTS, SEATS, BUDGET = 16, 2, 8, 128
PROMPT, ANSWER, BLOCK = 2000, 1000, 16
POOLS = (1.0, 1.1, 1.5, 2.0, 3.0, 6.0)
"""Sizes of the pool, in times of what the seats need."""


@dataclass(slots=True)
class Outcome:
    """What became of all requests."""

    useful: float
    """Share of the computed tokens that were computed for the first time."""
    tokens_per_second: float
    """Of answers."""
    num_preemptions: int
    drift: float
    """The most that the service of two users drifted apart while both waited."""
    bound: float
    """What fair.py promises of that."""


def simulate(policy: SharingPolicy, prices: Prices, num_blocks: int) -> Outcome:
    """Run all requests to their end."""
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK),
        policy,
        yielding=GivingWay(policy),
        max_num_seqs=SEATS,
        max_batched_tokens=BUDGET,
        max_model_len=PROMPT + ANSWER,
    )
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True, seed=0)
    for number in range(USERS * REQUESTS):
        prompt = [(number * PROMPT + place) % (1 << 20) for place in range(PROMPT)]
        user = str(number % USERS)
        scheduler.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params, user=user))
    seconds, computed, useful, preemptions, most = 0.0, 0, 0, 0, 0.0
    service = np.zeros(USERS)
    lowest, highest = np.full((USERS, USERS), np.inf), np.full((USERS, USERS), -np.inf)
    drift = 0.0
    while scheduler.has_work:
        plan = scheduler.schedule()
        results = [ChunkResult([SampledToken(7)]) if chunk.samples else NOTHING for chunk in plan.chunks]
        scheduler.commit(plan, results)
        seconds += 0.002 + 0.0004 * plan.num_tokens
        computed += plan.num_tokens
        useful += plan.num_tokens - sum(work.recomputed for work in plan.work)
        preemptions += len(plan.preempted)
        before = service.sum()
        for work in plan.work:
            service[int(work.sequence.request.user)] += prices.service(work)
        most = max(most, service.sum() - before)
        waiting = np.array([_waits(scheduler, user) for user in range(USERS)])
        both = waiting[:, None] & waiting[None, :]
        apart = service[:, None] - service[None, :]
        lowest = np.where(both, np.minimum(lowest, apart), np.inf)
        highest = np.where(both, np.maximum(highest, apart), -np.inf)
        drift = max(drift, float((highest - lowest).max()))
    bound = 2 * (QUANTUM + (MIN_TURN + 2) * most + prices.output * (PROMPT + ANSWER) / SHARE)
    tokens = USERS * REQUESTS * ANSWER
    return Outcome(useful / computed, tokens / seconds, preemptions, drift, bound)


def _waits(scheduler: Scheduler, user: int) -> bool:
    own = [f"{number}" for number in range(user, USERS * REQUESTS, USERS)]
    return any(name in scheduler.live_requests and (name, 0) not in scheduler.running for name in own)


def run(args: argparse.Namespace) -> None:
    """Print useful share and speed of both policies for each pool."""
    need = SEATS * -(-(PROMPT + ANSWER) // BLOCK)
    print(
        f"{USERS} users with {REQUESTS} requests each of {PROMPT} + {ANSWER} tokens, {SEATS} seats, {BUDGET} "
        "tokens a step; a step takes 2 ms, and 0.4 ms a token"
    )
    print("pool         fair: useful  tokens/s  preemptions    drift (bound)   fcfs: useful  tokens/s   fair/fcfs")
    for times in tqdm(POOLS, desc="pools", unit="pool"):
        prices = Prices()
        fair = simulate(FairShare(prices), prices, round(times * need))
        fcfs = simulate(ArrivalOrder(), prices, round(times * need))
        ratio = fair.tokens_per_second / fcfs.tokens_per_second
        tqdm.write(
            f"{times:3.1f} x need {fair.useful:14.0%} {fair.tokens_per_second:9.0f} {fair.num_preemptions:12} "
            f"{fair.drift:8.0f} ({fair.bound:.0f}) {fcfs.useful:14.0%} {fcfs.tokens_per_second:9.0f} {ratio:11.2f}"
        )
