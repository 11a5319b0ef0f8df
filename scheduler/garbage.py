"""When Python looks for garbage: not while somebody waits for it."""

from __future__ import annotations

import gc

NEVER = 1 << 30

MOST_ROUNDS = 200
"""Rounds of the middle generation after which all is looked through whoever waits: there are some 1.5 million more
objects by then."""


def keep_what_is_there() -> None:
    """What loading left stays. Of what comes after it Python would look through all every few seconds, which takes
    0.2 s where thousands of requests wait: from now on whoever knows when nobody does calls `collect`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)


def collect(*, is_idle: bool) -> None:
    """Look through all that has come since, if it is time."""
    num_rounds = gc.get_count()[2]
    if num_rounds > MOST_ROUNDS or (is_idle and num_rounds > 0):
        gc.collect()
