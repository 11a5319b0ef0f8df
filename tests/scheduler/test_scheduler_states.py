"""The scheduler under random arrivals, aborts and steps: exact accounts, and nobody's tokens written over."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scheduler.core.plan import Chunk, Plan
from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.seams import Reserve
from scheduler.core.sequence import Sequence, Status
from scheduler.core.windows import Holdings
from scheduler.features.audit import violations
from scheduler.features.context_window import ContextWindow
from scheduler.features.deadline import Deadlines
from scheduler.features.fair import FairShare
from scheduler.features.latency_target import LatencyTarget
from scheduler.features.leftovers import Leftovers
from scheduler.features.long_positions import LongPositions
from scheduler.features.prices import Prices
from scheduler.features.priority_class import CLASS_DISTANCE
from scheduler.features.resuming import resumed
from scheduler.features.saved_states import SavedStates
from scheduler.features.sharing_policy import ArrivalOrder, PriorityFirst, SharingPolicy
from scheduler.features.speculation import Speculation
from scheduler.features.step_cost import StepCost
from scheduler.features.text_drafts import TextDrafts
from scheduler.features.turns import Turns
from scheduler.wire.messages import Progress
from tests.scheduler.test_scheduler import make_scheduler, request, sampled


class RandomGuesses(Speculation):
    """Guesses anything, as many tokens as there may be."""

    def __init__(self, seed: int) -> None:
        super().__init__(TextDrafts(StepCost()))
        self._random = random.Random(seed)

    def draft(self, plan: Plan, room: int, reserve: Reserve, longest: float = math.inf) -> None:
        for place, chunk in enumerate(plan.chunks):
            count = self._random.randint(0, max(0, min(room, self.most(chunk))))
            if count and reserve(chunk.sequence, count):
                room -= count
                drafted = tuple(self._random.randint(0, 2) for _ in range(count))
                plan.chunks[place] = chunk._replace(drafted=drafted)

    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None:
        pass


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts and steps against a small pool, so that preemption is common.

    Of a model that has other positions for long texts, what is computed of a token is another thing there.

    A pretend model writes each computed token into a pretend KV pool, and reads what a sequence sees of its
    context back from there before it samples, group by group: if a block were shared wrongly, written while
    shared, or freed too early, that would differ from the sequence's tokens. It knows the block tables by their
    changes. Where it keeps states, one is the tokens that it has seen, by seat and by slot.
    """

    @initialize(
        num_blocks=st.integers(6, 20),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        max_batched_tokens=st.integers(1, 20),
        prefix_caching=st.booleans(),
        windows=st.sampled_from([(None,), (None,), (5,), (None, 3), (None, 8, 8, 1)]),
        policy=st.sampled_from(["fcfs", "priority", "fair", "fair"]),
        pace=st.sampled_from([None, "turns", "target"]),
        per_token=st.sampled_from([1e-4, 5e-3]),
        guesses=st.none() | st.integers(0, 99),
        shifts=st.booleans(),
        num_slots=st.sampled_from([0, 0, 1, 3, 9]),
        long_after=st.none() | st.integers(1, 30),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        prefix_caching: bool,
        windows: tuple[int | None, ...],
        policy: str,
        pace: str | None,
        per_token: float,
        guesses: int | None,
        shifts: bool,
        num_slots: int,
        long_after: int | None,
    ) -> None:
        self.holdings = Holdings(windows, block_size, max_batched_tokens)
        self.capacity = min(80, self.holdings.longest(num_blocks))
        self.now = 0.0
        self.cost = StepCost()
        for count in range(1, 60):
            self.cost.observe(count, 0, 1e-3 + per_token * count)

        def make() -> Scheduler:
            sharing = self._policy(policy, None if pace is None else 10 * per_token)
            scheduler = make_scheduler(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max_batched_tokens,
                max_model_len=self.capacity,
                prefix_caching=prefix_caching,
                policy=sharing,
                windows=windows,
                states=SavedStates(num_slots, block_size) if num_slots else None,
            )
            if pace is not None:
                pacing = Turns if pace == "turns" else LatencyTarget
                scheduler.pacing = pacing(self.cost, 10 * per_token, sharing)
            self.positions = LongPositions(scheduler, long_after)
            return scheduler

        self.make = make
        self.scheduler = make()
        self.deadlines = Deadlines()
        if num_slots:  # no token can be taken back from a state, and none dropped
            guesses, shifts = None, False
        self.long_after = long_after
        if long_after is not None:  # no model has both
            shifts = False
        self.states: list[list[int]] | None = [[] for _ in range(max_num_seqs)] if num_slots else None
        self.saved: dict[int, list[int]] = {}
        self.shifts = shifts and windows == (None,)
        if self.shifts:
            window = min(self.capacity // block_size, num_blocks - 1) * block_size
            self.scheduler.window = ContextWindow(window, block_size, 100)
        if guesses is not None:
            self.scheduler.drafter = RandomGuesses(guesses)
        self.kv: list[int | None] = [None] * (num_blocks * block_size)
        self.tables: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)  # of a seat, in a group
        self.sequences: list[Sequence] = []
        self.requests: list[Request] = []
        self.num_steps = 0

    def _policy(self, name: str, seconds: float | None) -> SharingPolicy:
        match name:
            case "fcfs":
                return ArrivalOrder()
            case "priority":
                return PriorityFirst()
        return FairShare(Prices(), lambda: self.now, Leftovers(self.cost, seconds))

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=24),
        max_tokens=st.integers(0, 12),
        n=st.integers(1, 3),
        user=st.sampled_from("abcdef"),
        priority=st.integers(0, 2),
        shifts=st.booleans(),
        scored=st.booleans(),
        seconds=st.none() | st.integers(0, 200),
        max_running=st.sampled_from([None, None, 1, 2]),
    )
    def arrive(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        user: str,
        priority: int,
        shifts: bool,
        scored: bool,
        seconds: int | None,
        max_running: int | None,
    ) -> None:
        """Users d and e are of the class low, f of the class high; without tokens an embedding is asked for."""
        name = str(len(self.requests))
        shifts = shifts and self.shifts and max_tokens > 0
        max_tokens *= 4 if shifts else 1
        kind: dict[str, object] = {"n": n, "context_shift": shifts}
        if max_tokens == 0:
            kind = {"pooling": "mean" if scored else "last"}
        elif scored and not shifts:
            kind["prompt_logprobs"] = 0
        newcomer = msgspec.structs.replace(
            request(name, prompt, max_tokens, **kind),
            user=user,
            weight=0.5 * 3 ** (ord(user) % 3),
            priority=priority + CLASS_DISTANCE * {"d": 1, "e": 1, "f": -1}.get(user, 0),
            deadline=None if seconds is None else self.now + seconds,
            max_running=max_running,
        )
        try:
            added = self.scheduler.add(newcomer)
            self.deadlines.add(added)
            self.positions.begin(added)
            self.sequences += added
            self.requests.append(newcomer)
        except InvalidRequestError:
            assert len(prompt) + max(1, max_tokens) > self.capacity
            assert not shifts or len(prompt) >= self.capacity

    @rule(seconds=st.sampled_from([0.1, 1.0, 31.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for late in self.deadlines.expire(self.scheduler, self.now):
            assert late.finish_reason is FinishReason.TIMEOUT
            assert late.request.deadline is not None
            assert late.request.deadline <= self.now

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def abort_one(self, data: st.DataObject) -> None:
        """As a beam search does with a beam."""
        live = [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]
        victim = data.draw(st.sampled_from(live))
        assert self.scheduler.abort(victim.request.request_id, victim.index) == [victim]

    @precondition(lambda self: self.scheduler.has_work and not self.shifts)
    @rule()
    def crash(self) -> None:
        """The engine is lost, and another one goes on with what the clients know."""
        live = [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]
        drafter = self.scheduler.drafter
        self.scheduler = self.make()
        if isinstance(drafter, RandomGuesses):
            self.scheduler.drafter = drafter
        self.kv[:] = [None] * len(self.kv)
        self.tables.clear()
        self.saved.clear()
        if self.states is not None:
            self.states = [[] for _ in self.states]
        done = [sequence for sequence in self.sequences if sequence.status is Status.FINISHED]
        self.sequences = done
        self.deadlines = Deadlines()
        for name, sequences in itertools.groupby(live, key=lambda sequence: sequence.request.request_id):
            known = [
                Progress(
                    index=each.index,
                    token_ids=each.token_ids[each.num_prompt_tokens :],
                    num_computed=each.num_ever_computed,
                    num_cached_tokens=each.num_cached_tokens,
                )
                for each in sequences
            ]
            lost = next(each for each in self.requests if each.request_id == name)
            again = self.scheduler.add(lost, [resumed(lost, each) for each in known])
            self.deadlines.add(again)
            self.positions.begin(again)
            self.sequences += again

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]
        victim = data.draw(st.sampled_from(live))
        self.scheduler.abort(victim.request.request_id)
        assert victim.finish_reason is FinishReason.ABORT

    @precondition(lambda self: self.scheduler.has_work)
    @rule(tokens=st.integers(0, 2))
    def step(self, tokens: int) -> None:
        self.one_step(tokens)

    def one_step(self, tokens: int) -> None:
        plan = self.scheduler.schedule()
        self.num_steps += 1
        self.now += self.cost.predict(plan.num_tokens, plan.attended)
        assert plan.chunks, "there is work, but the step would do nothing"
        assert plan.num_tokens <= self.scheduler.max_batched_tokens
        assert len({chunk.sequence.key for chunk in plan.chunks}) == len(plan.chunks)
        for change in plan.changes.tables:
            self.tables[change.seat, change.group].update(enumerate(change.blocks, change.start))
        size = self.scheduler.pool.block_size
        for source, target, _ in map(msgspec.structs.astuple, plan.changes.shifts):
            self.kv[target * size : (target + 1) * size] = self.kv[source * size : (source + 1) * size]
        if self.states is not None:
            for move in plan.changes.saves:
                assert len(self.states[move.seat]) == move.num_tokens
                self.saved[move.slot] = self.states[move.seat]
            for seat in plan.changes.vacated:
                self.states[seat] = []
            for move in plan.changes.loads:
                assert len(self.saved[move.slot]) == move.num_tokens
                self.states[move.seat] = self.saved[move.slot]
        for chunk in plan.chunks:
            self._compute(chunk)
        # Sequences that differ in index draw different tokens.
        self.scheduler.commit(plan, sampled(plan, lambda sequence: (tokens + sequence.index) % 3))
        self.positions.settle(chunk.sequence for chunk in plan.chunks)

    def _compute(self, chunk: Chunk) -> None:
        pool = self.scheduler.pool
        size = pool.block_size
        sequence = chunk.sequence
        token_ids = [*sequence.token_ids[: chunk.end], *chunk.drafted]
        if self.long_after is not None:
            is_long = sequence.num_tokens > self.long_after
            assert chunk.input().is_long == is_long
            assert is_long or len(token_ids) <= self.long_after, "a guess has the positions of a short text"
            token_ids = [token + 1000 * is_long for token in token_ids]  # what it computes is another thing
        assert chunk.start == sequence.num_computed_tokens
        for place in (chunk.start, len(token_ids) - 1):
            shift = sequence.window.shift_at(place) if isinstance(sequence.window, ContextWindow) else 0
            assert chunk.shift == shift, "it shifts within a chunk"
        if chunk.shift:
            del token_ids[size : size + chunk.shift]
        if self.states is not None:
            assert self.states[chunk.seat] == token_ids[: chunk.start], "it goes on from another state"
            self.states[chunk.seat] = token_ids
        start, end = chunk.start - chunk.shift, len(token_ids)
        for group, window in enumerate(pool.windows):
            table = self.tables[sequence.held.seat, group]
            for place in range(start, end):
                block = table[place // size]
                assert pool.references[block] == 1, "a shared block is written"
                self.kv[block * size + place % size] = token_ids[place]
            oldest = 0 if window is None else max(0, start - window + 1)
            seen = [self.kv[table[place // size] * size + place % size] for place in range(oldest, end)]
            assert seen == token_ids[oldest:end], "the KV pool does not hold this sequence's tokens"

    @invariant()
    def accounts_are_exact(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        assert violations(scheduler.seating) == []
        references = [0] * scheduler.pool.num_blocks
        for sequence in self.sequences:
            assert (sequence.status is Status.RUNNING) == (sequence.key in scheduler.running)
            assert (sequence.status is Status.RUNNING) == (sequence.lease is not None)
            if sequence.lease is None:
                continue
            for table, limit in zip(sequence.lease.tables, self.holdings.limits, strict=True):
                assert len(table.blocks) <= limit, "it holds what has fallen out of the window"
                for block in table.blocks:
                    references[block] += 1
            if sequence.lease.sink is not None:
                references[sequence.lease.sink] += 1
        assert references == [scheduler.pool.references[block] for block in range(scheduler.pool.num_blocks)]
        seats = [sequence.held.seat for sequence in scheduler.running.values()]
        assert len(set(seats)) == len(seats) <= scheduler.num_seats
        waiting = [
            sequence for sequence in self.sequences if sequence.status in (Status.WAITING, Status.FOLLOWING)
        ]
        assert scheduler.num_waiting == len(waiting)

    def teardown(self) -> None:
        """Whatever was admitted finishes, within the steps that its tokens can take, and returns every block."""
        if not hasattr(self, "scheduler"):
            return
        live = [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]
        bound = 10 + sum(2 * min(100, each.window.longest) for each in live)
        while self.scheduler.has_work:
            self.one_step(1)
            bound -= 1
            assert bound > 0, f"these starve: {[s for s in live if s.status is not Status.FINISHED]}"
        assert all(sequence.status is Status.FINISHED for sequence in self.sequences)
        assert self.scheduler.pool.num_used == 0
        assert not self.scheduler.live_requests


TestSchedulerStates = SchedulerMachine.TestCase
TestSchedulerStates.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_ten_thousand_runs() -> None:
    """The same, for as long as it takes to find what is rare."""
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=10_000, stateful_step_count=60, deadline=None)
    )
