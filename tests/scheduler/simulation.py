"""The real scheduler on a machine that only takes time: steps cost what a formula says, and a clock goes on."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import msgspec

from scheduler.core.plan import Plan
from scheduler.core.request import Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.sequence import Sequence
from scheduler.features.fair import FairShare
from scheduler.features.latency_target import LatencyTarget
from scheduler.features.leftovers import Leftovers
from scheduler.features.prices import Prices
from scheduler.features.step_cost import StepCost
from scheduler.features.turns import Turns
from tests.scheduler.test_scheduler import make_scheduler, request, sampled

PRICES = Prices()


class Simulation:
    """Users who send requests to a scheduler of fair shares, on a machine whose steps take `fixed` seconds and
    `per_token` for each token. `target`: a latency target in seconds, in place of turns."""

    def __init__(
        self,
        *,
        per_token: float = 2e-4,
        fixed: float = 5e-3,
        seats: int = 64,
        budget: int = 128,
        num_blocks: int = 8000,
        longest: int = 4000,
        target: float | None = None,
    ) -> None:
        self.now = 0.0
        self.fixed, self.per_token = fixed, per_token
        self.cost = StepCost()
        for _ in range(200):  # it has run for a while
            for count in (1, 8, 64):
                self.cost.observe(count, 0, fixed + per_token * count)
        seconds = 0.04 if target is None else target
        self.policy = FairShare(PRICES, lambda: self.now, Leftovers(self.cost, seconds))
        self.scheduler: Scheduler = make_scheduler(
            num_blocks=num_blocks,
            block_size=16,
            max_num_seqs=seats,
            max_batched_tokens=budget,
            max_model_len=longest,
            policy=self.policy,
        )
        divided = Turns(self.cost, 0.04, self.policy)
        self.scheduler.pacing = divided if target is None else LatencyTarget(self.cost, target, self.policy)
        self.live: Counter[str] = Counter()
        """Sequences that have not ended, by user."""
        self.tokens: Counter[str] = Counter()
        """Of answers, by user."""
        self.service: dict[str, float] = defaultdict(float)
        self._names = itertools.count()

    def send(self, user: str, prompt: int, max_tokens: int, *, count: int = 1, **fields: object) -> list[Request]:
        """Requests of random prompts that nobody else has."""
        sent = []
        for _ in range(count):
            new = request(f"{user}/{next(self._names)}", prompt, max_tokens, ignore_eos=True)
            sent.append(msgspec.structs.replace(new, user=user, arrival_time=self.now, **fields))
            self.live[user] += len(self.scheduler.add(sent[-1]))
        return sent

    def step(self) -> Plan:
        """One step, which takes its time; with nothing to compute, a moment."""
        plan = self.scheduler.schedule()
        seconds = self.fixed + self.per_token * plan.num_tokens if plan.chunks else 1e-3
        for gain in self.scheduler.commit(plan, sampled(plan)):
            user = gain.sequence.request.user
            self.tokens[user] += len(gain.result.tokens)
            self.live[user] -= gain.sequence.finish_reason is not None
        for work in plan.work:
            self.service[work.sequence.request.user] += PRICES.service(work)
        self.now += seconds
        if plan.chunks:
            self.cost.observe(plan.num_tokens, plan.attended, seconds)
        return plan

    def running(self, user: str) -> list[Sequence]:
        """A user's sequences that have a seat."""
        return [each for each in self.scheduler.running.values() if each.request.user == user]
