"""Threads follow the cores that are free."""

from __future__ import annotations

from scheduler.core.plan import Plan
from scheduler.process.free_cores import LONGEST_TRIAL, WINDOW, FreeCores, waits
from scheduler.wire.messages import Phases, StepStats

PLAN = Plan(chunks=[], admitted=[], preempted=[])


class Machine:
    """Two cores, one of which another program may share; keeps the account that the operating system would."""

    def __init__(self) -> None:
        self.share_taken = 0.0
        self.waited = {1: 0.0, 2: 0.0}
        self.cores = FreeCores(2, lambda threads: None, lambda: dict(self.waited))

    def run(self, seconds: float, step: float = 0.01) -> list[int]:
        """Steps for so long; returns how many threads each had."""
        threads = []
        for _ in range(round(seconds / step)):
            threads.append(self.cores.threads)
            if self.cores.threads == 2:
                self.waited[2] += step * self.share_taken
            stats = StepStats(step, 1, 0, 0, 0, 1, 0, 0, 0, Phases(0.0, step, 0.0, 0.0), {})
            self.cores.step(PLAN, 0.0, stats, [])
        return threads


def test_all_threads_take_part_while_nobody_else_wants_the_cores() -> None:
    assert set(Machine().run(30)) == {2}


def test_a_core_that_is_shared_is_given_up_and_found_again() -> None:
    machine = Machine()
    machine.share_taken = 0.6
    threads = machine.run(120)
    assert threads[0] == 2
    assert threads.count(1) > 0.9 * len(threads)
    assert set(threads[-2000:]) == {1, 2}, "it is tried from time to time"
    machine.share_taken = 0.0
    assert set(machine.run(60)[round((LONGEST_TRIAL + 2 * WINDOW) / 0.01) :]) == {2}


def test_a_core_that_is_taken_now_and_then_is_kept() -> None:
    machine = Machine()
    machine.share_taken = 0.2
    assert set(machine.run(30)) == {2}


def test_the_operating_system_tells_of_every_thread() -> None:
    assert all(seconds >= 0 for seconds in waits().values())
