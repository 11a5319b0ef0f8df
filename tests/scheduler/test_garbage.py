"""Garbage is looked for while nobody waits, and not for ever put off."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from scheduler import garbage


class Knot:
    """Refers to itself: no count of references frees it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def _patient() -> Iterator[None]:
    thresholds = gc.get_threshold()
    garbage.keep_what_is_there()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def old_knot() -> weakref.ref[Knot]:
    """One that has become old, and that nobody holds."""
    knot = Knot()
    gc.collect(1)
    return weakref.ref(knot)


@pytest.mark.usefixtures("_patient")
def test_all_is_looked_through_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    knot = old_knot()
    more: list[list[int]] = [[] for _ in range(500_000)]  # Python would have looked through all by now
    garbage.collect(is_idle=False)
    assert knot() is not None
    garbage.collect(is_idle=True)
    assert knot() is None
    assert len(more) == 500_000
    knot = old_knot()
    monkeypatch.setattr(garbage, "MOST_ROUNDS", 0)
    garbage.collect(is_idle=False)
    assert knot() is None, "where nobody is ever idle it is looked for all the same"
