"""Users of the class low: what they get, what they leave to the others, and that nobody starves."""

from __future__ import annotations

import functools

import pytest

from scheduler.features.accounts import QUANTUM
from scheduler.features.fair import LOW_SECONDS
from scheduler.features.leftovers import LOW_SHARE
from scheduler.features.priority_class import CLASS_DISTANCE
from tests.scheduler.simulation import PRICES, Simulation

LOW = {"priority": CLASS_DISTANCE}


def chats_rate(
    simulation: Simulation, num_low: int, seconds: float, *, num_chats: int = 8, prompt: int = 2000
) -> float:
    """Tokens a second of chats that never pause, beside low users who always have something to do."""
    end = simulation.now + seconds
    while simulation.now < end:
        for chat in range(num_chats):
            if simulation.live[f"chat{chat}"] == 0:
                simulation.send(f"chat{chat}", 40, 100)
        for low in range(num_low):
            if simulation.live[f"low{low}"] < 2:
                simulation.send(f"low{low}", prompt, 50, **LOW)
        simulation.step()
    return sum(simulation.tokens[f"chat{chat}"] for chat in range(num_chats)) / seconds


@functools.cache
def rate_alone(per_token: float, target: float | None) -> float:
    """Of chats that nobody disturbs."""
    return chats_rate(Simulation(per_token=per_token, target=target), 0, 50)


@pytest.mark.parametrize("target", [None, 0.1])
@pytest.mark.parametrize(
    ("per_token", "num_low", "prompt"),
    [(2e-4, 1, 2000), (2e-3, 1, 2000), (2e-3, 30, 2000), (2e-3, 100, 300), (5e-3, 1, 2000), (5e-3, 30, 300)],
)
def test_chats_keep_nine_tenths_of_their_tokens_beside_low_users(
    target: float | None, per_token: float, num_low: int, prompt: int
) -> None:
    simulation = Simulation(per_token=per_token, target=target)
    beside = chats_rate(simulation, num_low, 50, prompt=prompt)
    assert beside >= 0.9 * rate_alone(per_token, target)
    assert sum(served for user, served in simulation.service.items() if user.startswith("low")) > 0


@pytest.mark.parametrize("seats", [4, 16])
def test_they_keep_it_too_where_they_need_all_the_seats(seats: int) -> None:
    alone, beside = (
        chats_rate(Simulation(per_token=5e-4, seats=seats), count, 90, num_chats=2 * seats) for count in (0, 10)
    )
    assert beside >= 0.9 * alone


def test_low_users_alone_have_the_whole_machine() -> None:
    simulation = Simulation(seats=8)
    simulation.send("batch", 200, 50, count=30, **LOW)
    while simulation.scheduler.has_work:
        simulation.step()
    served = 30 * (200 + 50)
    assert simulation.now <= 1.6 * (served * simulation.per_token + served / 24 * simulation.fixed)


@pytest.mark.parametrize("per_token", [2e-4, 5e-3])
def test_a_newcomer_has_a_low_users_seat_at_once(per_token: float) -> None:
    simulation = Simulation(per_token=per_token, seats=4)
    simulation.send("batch", 200, 500, count=8, **LOW)
    while len([each for each in simulation.running("batch") if each.num_output_tokens > 0]) < 4:
        simulation.step()
    simulation.send("batch", 20, 500, count=1, **LOW)
    for _ in range(3):  # some have just been seated, and have begun
        simulation.step()
    simulation.send("guest", 20, 10)
    plan = simulation.step()
    assert len(simulation.running("guest")) == 1
    assert [sequence.request.user for sequence in plan.preempted] == ["batch"]


@pytest.mark.parametrize("seats", [4, 64])
@pytest.mark.parametrize("num_low", [1, 12])
def test_no_low_user_starves(seats: int, num_low: int) -> None:
    """However many chats want all seats: each low user has a quantum within the time that fair.py states."""
    simulation = Simulation(per_token=1e-3, seats=seats)
    longest_step = simulation.fixed + 2 * seats * simulation.per_token
    lasts = QUANTUM / PRICES.output * longest_step  # it decodes one token a step
    takes = max(QUANTUM * simulation.per_token, lasts / seats)
    bound = LOW_SECONDS + (num_low + 1) * max(takes / LOW_SHARE, lasts)
    had = dict.fromkeys((f"low{number}" for number in range(num_low)), 0.0)
    since = dict.fromkeys(had, 0.0)
    for low in had:
        simulation.send(low, 60, 3000, count=2, **LOW)
    while simulation.now < 1.5 * bound:
        for chat in range(2 * seats):
            if simulation.live[f"chat{chat}"] == 0:
                simulation.send(f"chat{chat}", 40, 100)
        simulation.step()
        for low in had:
            if simulation.service[low] - had[low] >= QUANTUM:
                had[low], since[low] = simulation.service[low], simulation.now
            assert simulation.now - since[low] <= bound


def test_where_others_want_every_seat_a_low_user_has_a_quantum_now_and_then() -> None:
    simulation = Simulation(seats=4)
    simulation.send("batch", 20, 500, count=8, **LOW)
    simulation.step()
    assert len(simulation.running("batch")) == 4, "nobody else is there"
    simulation.send("chat", 20, 100, count=2000)
    simulation.step()
    assert len(simulation.running("chat")) == 4
    for _ in range(3):
        had, start = simulation.service["batch"], simulation.now
        while simulation.now < start + 0.9 * LOW_SECONDS:
            simulation.step()
        assert simulation.service["batch"] == had
        while simulation.service["batch"] < had + QUANTUM:
            simulation.step()
        simulation.step()
        assert len(simulation.running("chat")) == 4


def test_two_low_users_who_are_owed_something_do_not_take_each_others_seats() -> None:
    """A plan once took the same seat from one for the other and back for ever."""
    simulation = Simulation(seats=8)
    while simulation.now < 60:
        for chat in range(12):
            if simulation.live[f"chat{chat}"] == 0:
                simulation.send(f"chat{chat}", 20, 60)
        for low in ("one", "other"):
            if simulation.live[low] < 3:
                simulation.send(low, 100, 30, **LOW)
        plan = simulation.step()
        assert len(plan.preempted) <= 8
    assert simulation.tokens["one"] > 0 < simulation.tokens["other"]
