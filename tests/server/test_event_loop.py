"""The server's event loop."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from itertools import pairwise

from server.event_loop import NEWCOMERS_AT_ONCE, new_event_loop


def test_a_burst_is_taken_a_few_at_a_time_and_nobody_is_forgotten() -> None:
    with ExitStack() as stack:
        loop = new_event_loop()
        stack.callback(loop.close)
        served: list[int] = []
        turns: list[int] = []

        def turn() -> None:
            turns.append(len(served))
            if len(served) < 100:
                loop.call_soon(turn)
            else:
                loop.stop()

        def serve(number: int, end: socket.socket) -> None:
            served.append(number)
            loop.remove_reader(end)

        for number in range(100):
            near, far = (stack.enter_context(end) for end in socket.socketpair())
            loop.add_reader(near, serve, number, near)
            far.send(b"x")
        loop.call_soon(turn)
        loop.run_forever()
    assert sorted(served) == list(range(100))
    assert max(after - before for before, after in pairwise(turns)) <= NEWCOMERS_AT_ONCE
