"""The scheduler: what a step computes, and that nobody is lost, starved or written over."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable
from typing import cast

import msgspec
import pytest

from scheduler.core.blocks import BlockPool
from scheduler.core.plan import Chunk, Plan
from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.seams import States
from scheduler.core.sequence import Sequence
from scheduler.core.step import NOTHING, ChunkResult, SampledToken, StepResult
from scheduler.features.deadline import Deadlines
from scheduler.features.fair import FairShare
from scheduler.features.giving_way import GivingWay
from scheduler.features.prices import Prices
from scheduler.features.sharing_policy import ArrivalOrder, SharingPolicy
from scheduler.fitting import check_fits
from scheduler.sampling_params import SamplingParams

EOS = 0


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_batched_tokens: int = 16,
    max_model_len: int = 100,
    prefix_caching: bool = True,
    share_prefixes: bool = False,
    policy: SharingPolicy | None = None,
    windows: tuple[int | None, ...] = (None,),
    states: States | None = None,
) -> Scheduler:
    policy = ArrivalOrder() if policy is None else policy
    return Scheduler(
        BlockPool(num_blocks, block_size, windows),
        policy,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len,
        eos_token_ids=[EOS],
        prefix_caching=prefix_caching,
        share_prefixes=share_prefixes,
        states=states,
        yielding=GivingWay(policy),
    )


def policy_of(scheduler: Scheduler) -> SharingPolicy:
    """That of a scheduler made here."""
    return cast(SharingPolicy, scheduler.policy)


def request(name: str, prompt: int | list[int], max_tokens: int = 8, **params: object) -> Request:
    """A request with the given prompt, or with one of the given length that no other request shares."""
    if isinstance(prompt, int):
        rng = random.Random(name)
        prompt = [rng.randrange(10, 1000) for _ in range(prompt)]
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, seed=0, **params),  # type: ignore[arg-type]
    )


def run_step(scheduler: Scheduler, token: int = 7) -> Plan:
    """One step in which every sampled token is `token`."""
    plan = scheduler.schedule()
    scheduler.commit(plan, sampled(plan, lambda _: token))
    return plan


def sampled(plan: Plan, token: Callable[[Sequence], int] = lambda _: 7) -> StepResult:
    """The result of a step in which each sequence samples `token(sequence)`, and again after each right guess."""
    return [
        ChunkResult(_kept(chunk, token(chunk.sequence))) if chunk.samples else NOTHING for chunk in plan.chunks
    ]


def _kept(chunk: Chunk, token: int) -> list[SampledToken]:
    right = itertools.takewhile(lambda guess: guess == token, chunk.drafted)
    return [SampledToken(token) for _ in (None, *right)]


def cached(plan: Plan) -> int:
    """Prompt tokens of the newly admitted that the prefix cache spared."""
    return sum(sequence.num_cached_tokens for sequence in plan.admitted)


def shape(plan: Plan) -> dict[str, tuple[int, int]]:
    """Who computes which tokens: {name: (start, end)}."""
    return {chunk.sequence.request.request_id: (chunk.start, chunk.end) for chunk in plan.chunks}


def test_a_prompt_is_computed_in_chunks_while_others_decode() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("short", 3))
    assert shape(run_step(scheduler)) == {"short": (0, 3)}
    scheduler.add(request("long", 40))
    assert shape(run_step(scheduler)) == {"short": (3, 4), "long": (0, 15)}
    assert shape(run_step(scheduler)) == {"short": (4, 5), "long": (15, 30)}
    assert shape(run_step(scheduler)) == {"short": (5, 6), "long": (30, 40)}
    assert shape(run_step(scheduler)) == {"short": (6, 7), "long": (40, 41)}


def test_a_newcomer_joins_the_running_batch_at_the_next_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("first", 3, max_tokens=50))
    run_step(scheduler)
    (newcomer,) = scheduler.add(request("second", 3))
    run_step(scheduler)
    assert newcomer.num_output_tokens == 1
    assert scheduler.num_running == 2


def test_at_most_max_num_seqs_run_and_the_rest_wait_in_order() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abcd":
        scheduler.add(request(name, 2, max_tokens=2))
    assert list(shape(run_step(scheduler))) == ["a", "b"]
    assert scheduler.num_waiting == 2
    run_step(scheduler)
    assert list(shape(run_step(scheduler))) == ["c", "d"]


def test_there_are_never_more_seats_than_tokens_in_a_step() -> None:
    scheduler = make_scheduler(max_num_seqs=64, max_batched_tokens=3)
    for index in range(10):
        scheduler.add(request(str(index), 2))
    while scheduler.has_work:
        plan = run_step(scheduler)
        assert plan.num_tokens <= 3
        assert scheduler.num_running <= 3


def test_without_blocks_the_latest_arrival_gives_way_and_resumes_from_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=32)
    (first,) = scheduler.add(request("first", 8, max_tokens=20))
    (second,) = scheduler.add(request("second", 8, max_tokens=20))
    plans = []
    while scheduler.has_work:
        plans.append(run_step(scheduler))
    preempted = [sequence for plan in plans for sequence in plan.preempted]
    assert preempted
    assert set(preempted) == {second}
    resumed = next(
        plan
        for plan in plans[1:]
        if any(chunk.sequence is second and chunk.start > 0 and chunk.length > 1 for chunk in plan.chunks)
    )
    assert cached(resumed) == 0, "resumption does not count as a cache hit of a new prompt"
    assert first.num_output_tokens == second.num_output_tokens == 20


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make_scheduler()
    system = [5] * 12
    scheduler.add(request("a", [*system, 1]))
    run_step(scheduler)
    (b,) = scheduler.add(request("b", [*system, 2]))
    plan = run_step(scheduler)
    assert shape(plan)["b"] == (12, 13)
    assert plan.admitted == [b]
    assert b.num_cached_tokens == 12


def test_what_was_cached_is_what_is_found_by_who_computes() -> None:
    """A sequence that loses its seat before it has computed anything may find something else later."""
    scheduler = make_scheduler()
    scheduler.add(request("before", [5] * 12 + [1], 1))
    run_step(scheduler)
    (late,) = scheduler.add(request("late", [5] * 12 + [2]))
    scheduler.schedule()
    assert late.num_cached_tokens == 12
    scheduler.admission.preempt(late)
    scheduler.pool.reset()
    plan = run_step(scheduler)
    assert late.num_cached_tokens == 0
    assert [(work.prompt, work.cached, work.recomputed) for work in plan.work] == [(13, 0, 0)]


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add(request("a", [5] * 13))
    run_step(scheduler)
    scheduler.add(request("b", [5] * 13))
    assert shape(run_step(scheduler))["b"] == (0, 13)


def test_reasons_to_stop() -> None:
    scheduler = make_scheduler()
    (eos,) = scheduler.add(request("eos", 2))
    (ignoring,) = scheduler.add(request("ignoring", 2, ignore_eos=True))
    (patient,) = scheduler.add(request("patient", 2, min_tokens=2))
    run_step(scheduler, token=EOS)
    assert eos.finish_reason is FinishReason.STOP
    assert ignoring.finish_reason is patient.finish_reason is None
    run_step(scheduler, token=EOS)
    assert patient.finish_reason is FinishReason.STOP
    for _ in range(6):
        run_step(scheduler, token=EOS)
    assert ignoring.finish_reason is FinishReason.LENGTH

    (stopped,) = scheduler.add(request("stop token", 2, stop_token_ids=frozenset({7})))
    run_step(scheduler, token=7)
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, 7)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1000], 1, "token ids outside of 0 to 999"),
        (100, 1, "requested 101 tokens .100 in the prompt, 1 in the answer.: shorten the prompt."),
        (60, 41, "60 in the prompt, 41 in the answer.: shorten the prompt or lower max_tokens"),
    ],
)
def test_what_can_never_fit_is_refused_in_words(prompt: int | list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_fits(request("too much", prompt, max_tokens), max_model_len=100, pool_tokens=256, vocab_size=1000)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "num_blocks"), [([], 1, 64), (100, 1, 64), (60, 41, 64), (16, 8, 4)]
)
def test_what_can_never_fit_is_not_queued(prompt: int | list[int], max_tokens: int, num_blocks: int) -> None:
    """A small pool bounds the length too."""
    scheduler = make_scheduler(num_blocks=num_blocks)
    with pytest.raises(InvalidRequestError):
        scheduler.add(request("too much", prompt, max_tokens))
    assert not scheduler.has_work


def test_abort_in_every_state() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    (running,) = scheduler.add(request("running", 20))
    (waiting,) = scheduler.add(request("waiting", 5))
    run_step(scheduler)
    for name in ("waiting", "running", "running", "unknown"):
        scheduler.abort(name)
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_what_has_ended_is_kept_nowhere() -> None:
    """Deadlines far away, and a waiting queue that never empties, must not hold on to those who have gone."""
    for policy in (ArrivalOrder(), FairShare(Prices())):
        scheduler, deadlines = make_scheduler(max_num_seqs=1, policy=policy), Deadlines()
        scheduler.add(request("runs", 5, max_tokens=90))
        scheduler.add(request("waits", 5))
        run_step(scheduler)
        for index in range(5000):
            passing = msgspec.structs.replace(request(str(index), [1, 2, 3], n=2), deadline=1e9 - index)
            deadlines.add(scheduler.add(passing))
            if index % 2:
                for sequence in scheduler.abort(passing.request_id):
                    deadlines.forget(sequence)
            else:
                assert len(deadlines.expire(scheduler, 1e9)) == 2
        assert scheduler.num_waiting == 1
        gc.collect()
        left = [thing for thing in gc.get_objects() if isinstance(thing, Sequence)]
        assert sum(sequence.request.request_id.isdecimal() for sequence in left) < 100


def test_the_n_sequences_of_a_request_compute_its_prompt_once() -> None:
    scheduler = make_scheduler(num_blocks=400, max_num_seqs=64, max_batched_tokens=200)
    sequences = scheduler.add(request("many", 42, max_tokens=8, n=64))
    assert shape(run_step(scheduler)) == {"many": (0, 42)}
    assert scheduler.num_waiting == 63
    followers = run_step(scheduler)
    assert all(chunk.start == 40 for chunk in followers.chunks if chunk.sequence.index > 0)
    assert not followers.preempted
    while scheduler.has_work:
        run_step(scheduler)
    assert {sequence.num_output_tokens for sequence in sequences} == {8}


def test_siblings_go_on_without_the_one_who_went_ahead() -> None:
    scheduler = make_scheduler()
    first, *others = scheduler.add(request("many", 40, n=3))
    run_step(scheduler)
    scheduler.abort("many", 0)
    while scheduler.has_work:
        run_step(scheduler)
    assert first.finish_reason is FinishReason.ABORT
    assert [sequence.finish_reason for sequence in others] == [FinishReason.LENGTH] * 2
    scheduler.add(request("gone", 40, n=3))
    run_step(scheduler)
    assert len(scheduler.abort("gone")) == 3
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_users_do_not_find_each_others_prefixes_unless_they_are_shared() -> None:
    for share in (False, True):
        scheduler = make_scheduler(share_prefixes=share)
        for user in ("alice", "bob"):
            scheduler.add(msgspec.structs.replace(request(user, [5] * 13, max_tokens=1), user=user))
            found = cached(run_step(scheduler))
        assert found == (12 if share else 0)


def test_texts_that_are_read_again_and_again_evict_nobodys_prefixes() -> None:
    """An embedding and a prompt's logprobs are computed though the prefix is known, in blocks of their own."""
    scheduler = make_scheduler(num_blocks=30)
    scheduler.add(msgspec.structs.replace(request("chat", [5] * 21, max_tokens=1), user="somebody"))
    run_step(scheduler)
    for number in range(26):
        kind: dict[str, object] = {"pooling": "mean"} if number % 2 else {"prompt_logprobs": 0}
        scheduler.add(request(f"text{number}", [7] * 40, max_tokens=0 if number % 2 else 1, **kind))
        while scheduler.has_work:
            run_step(scheduler)
    scheduler.add(msgspec.structs.replace(request("again", [5] * 21, max_tokens=1), user="somebody"))
    assert cached(run_step(scheduler)) == 20


def test_a_sequence_that_was_crowded_out_does_not_come_back_to_be_crowded_out_again() -> None:
    scheduler = make_scheduler(num_blocks=30, max_num_seqs=4, max_model_len=100, prefix_caching=False)
    sequences = [scheduler.add(request(name, 24, max_tokens=30))[0] for name in "abcd"]
    computed = 0
    while scheduler.has_work:
        computed += run_step(scheduler).num_tokens
    assert max(sequence.num_preemptions for sequence in sequences) == 1
    assert computed < 1.5 * 4 * 54


def test_one_of_n_sequences_can_be_aborted() -> None:
    scheduler = make_scheduler()
    first, second = scheduler.add(request("pair", 3, n=2))
    run_step(scheduler)
    scheduler.abort("pair", 0)
    for _ in range(2):
        run_step(scheduler)
    assert first.finish_reason is FinishReason.ABORT
    assert second.num_output_tokens == 2


def test_a_plan_does_not_look_at_the_whole_queue() -> None:
    class CountingPolicy(ArrivalOrder):
        looks = 0

        def peek(self) -> Sequence | None:
            self.looks += 1
            return super().peek()

    policy = CountingPolicy()
    scheduler = Scheduler(BlockPool(100, 4), policy, max_num_seqs=2, max_batched_tokens=8, max_model_len=100)
    for index in range(5000):
        scheduler.add(request(str(index), [1, 2, 3]))
    run_step(scheduler)
    assert policy.looks <= 4
