"""Who does not fit for want of blocks: others pass, the order within a user stays, and nobody starves."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from scheduler.core.blocks import BlockPool
from scheduler.core.scheduler import Scheduler
from scheduler.core.sequence import Sequence, Status
from scheduler.features.fair import FairShare
from scheduler.features.passing import PATIENCE
from scheduler.features.sharing_policy import ArrivalOrder, PriorityFirst, SharingPolicy
from tests.scheduler.simulation import PRICES, Simulation
from tests.scheduler.test_scheduler import make_scheduler, request, run_step


def test_short_chats_pass_a_prompt_that_has_to_wait_for_blocks() -> None:
    simulation = Simulation(per_token=1e-4, budget=256, num_blocks=4000, longest=60_000)
    simulation.send("reader", 40_000, 500)
    while not any(each.num_output_tokens for each in simulation.running("reader")):
        simulation.step()
    (long,) = simulation.send("second reader", 46_000, 10)
    (behind,) = simulation.send("second reader", 20, 10)
    for number in range(20):
        simulation.send(f"chat{number}", 30, 20)
    for _ in range(40):
        simulation.step()
    assert sum(simulation.live[f"chat{number}"] for number in range(20)) == 0
    assert simulation.live["second reader"] == 2
    admitted: list[str] = []
    while simulation.live["second reader"]:
        admitted += [each.request.request_id for each in simulation.step().admitted]
    assert admitted == [long.request_id, behind.request_id], "the order within a user stays"


@pytest.mark.parametrize("policy", [ArrivalOrder, PriorityFirst, lambda: FairShare(PRICES)])
def test_whoever_is_passed_has_a_seat_when_those_have_ended_who_ran(
    policy: Callable[[], SharingPolicy],
) -> None:
    """A stream of newcomers who always find the blocks that would be missing for it."""
    for seed in range(30):
        rng = random.Random(seed)
        scheduler = _small(policy())
        before = [
            _arrive(scheduler, f"first{n}", rng.randint(50, 200), rng.randint(100, 300))[0] for n in range(4)
        ]
        for _ in range(20):
            run_step(scheduler)
        (long,) = _arrive(scheduler, "long", rng.randint(500, 850), 20)
        there = before
        for number in range(3000):
            if number % 3 == 0:
                _arrive(scheduler, f"passes{number}", rng.randint(10, 80), rng.randint(10, 120))
            if number <= PATIENCE:
                there = [*before, *scheduler.running.values()]
            they_ended = all(each.status is Status.FINISHED for each in there)
            run_step(scheduler)
            if long.status is not Status.WAITING:
                break
            assert not they_ended
        assert scheduler.num_waiting > 0 or number <= PATIENCE, "nobody would have been in its way"


def _small(policy: SharingPolicy) -> Scheduler:
    return make_scheduler(
        num_blocks=60, block_size=16, max_num_seqs=12, max_batched_tokens=128, max_model_len=900, policy=policy
    )


def _arrive(scheduler: Scheduler, user: str, prompt: int, max_tokens: int) -> list[Sequence]:
    new = request(user, prompt, max_tokens, ignore_eos=True)
    return scheduler.add(msgspec.structs.replace(new, user=user))


def test_who_waits_is_not_looked_up_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    lookup = BlockPool.lookup

    def counted(self: BlockPool, *args: object) -> object:
        nonlocal looks
        looks += 1
        return lookup(self, *args)  # type: ignore[arg-type]

    for seats in (1, 8):  # without a free seat, and without the blocks
        scheduler = make_scheduler(
            num_blocks=60, block_size=16, max_num_seqs=seats, max_batched_tokens=128, max_model_len=900
        )
        _arrive(scheduler, "first", 500, 200)
        while scheduler.num_running < 1 or scheduler.num_waiting:
            run_step(scheduler)
        _arrive(scheduler, "long", 700, 20)
        monkeypatch.setattr(BlockPool, "lookup", counted)
        looks = 0
        for _ in range(50):
            run_step(scheduler)
        assert (scheduler.num_waiting, looks) == (1, 0)
        monkeypatch.undo()
