"""The pulse: one process writes it at every step, while another one reads."""

from __future__ import annotations

import multiprocessing
import os
import time

from scheduler.wire.pulse import Pulse, new_pulse_file

NAMES = [f"request-{number:032d}" for number in range(40)]


def write(descriptor: int, seconds: float) -> None:
    pulse = Pulse(descriptor)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pulse.begin(NAMES, 30.0)
        pulse.begin(NAMES[:3], 30.0)
        pulse.end()
    pulse.begin(NAMES, 30.0)


def test_who_looks_while_it_is_written_sees_nothing_that_is_not() -> None:
    descriptor = new_pulse_file()
    writer = multiprocessing.get_context("fork").Process(target=write, args=(os.dup(descriptor), 1.0))
    writer.start()
    pulse = Pulse(descriptor)
    num_seen = 0
    while writer.is_alive():
        if (work := pulse.work) is not None:
            num_seen += 1
            assert work.limit == 30.0
            assert time.monotonic() - work.started < work.limit, "it would be taken to hang"
    writer.join()
    assert num_seen > 0
    assert pulse.in_hand == NAMES
    pulse.close()
