"""A thread that users share: in turns, by the time that each has had."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import CancelledError
from functools import partial

import pytest

from scheduler.shared_thread import PIECE_SECONDS, SharedThread, give_way


def test_who_comes_waits_for_one_piece_of_work_and_not_for_a_flood() -> None:
    thread, gate, order = SharedThread("test"), threading.Event(), list[str]()
    first = thread.submit("alice", gate.wait)
    others = [thread.submit("alice", lambda: order.append("alice")) for _ in range(100)]
    others += [thread.submit("bob", lambda: order.append("bob")) for _ in range(2)]
    gate.set()
    first.result()
    for future in others:
        future.result()
    assert order.index("bob") == 0, "alice has had the time of her first one"
    assert Counter(order) == {"alice": 100, "bob": 2}
    thread.shutdown()


def test_each_users_own_order_is_kept() -> None:
    thread, order = SharedThread("test"), list[int]()
    for future in [thread.submit("alice", partial(order.append, number)) for number in range(50)]:
        future.result()
    assert order == list(range(50))
    thread.shutdown()


def test_long_work_lets_others_come_between() -> None:
    def long() -> Generator[None, None, str]:
        while not came_between.is_set():
            time.sleep(PIECE_SECONDS / 10)
            yield
        return "done"

    thread, came_between = SharedThread("test"), threading.Event()
    of_alice = thread.submit_pieces("alice", long())
    thread.submit("bob", came_between.set).result(30)
    assert of_alice.result(30) == "done"
    thread.shutdown()


def test_a_task_may_give_way_in_its_middle() -> None:
    thread, begun, others_wait, order = SharedThread("test"), threading.Event(), threading.Event(), list[str]()

    def long() -> None:
        begun.set()
        others_wait.wait()
        time.sleep(0.01)
        give_way()
        order.append("alice")

    of_alice = thread.submit("alice", long)
    begun.wait()
    others = [thread.submit(name, partial(order.append, name)) for name in ("alice, the second", "bob", "carol")]
    others.append(thread.submit("alice", partial(order.append, "alice again")))
    others_wait.set()
    of_alice.result()
    for future in others:
        future.result()
    assert order[-2:] == ["alice", "alice again"], "her own come in their order"
    assert sorted(order[:3]) == ["alice, the second", "bob", "carol"]
    give_way()
    thread.shutdown()


def test_what_fails_and_what_is_cancelled_holds_nobody_up() -> None:
    def fail() -> None:
        raise ValueError("as it should")

    thread, gate = SharedThread("test"), threading.Event()
    first = thread.submit("alice", gate.wait)
    failing, cancelled = thread.submit("alice", fail), thread.submit("alice", lambda: 1)
    assert cancelled.cancel()
    gate.set()
    assert first.result()
    with pytest.raises(ValueError, match="as it should"):
        failing.result()
    assert thread.submit("alice", lambda: 2).result() == 2
    thread.shutdown()


def test_what_has_not_begun_at_the_end_is_dropped() -> None:
    thread, begun, gate = SharedThread("test"), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait()

    thread.submit("alice", hold)
    begun.wait()
    waiting = thread.submit("alice", lambda: 1)
    thread.shutdown()
    gate.set()
    with pytest.raises(CancelledError):
        waiting.result()
