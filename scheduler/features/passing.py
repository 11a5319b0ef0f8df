"""Who does not fit is passed by others, and does not starve for it.

A long prompt that has to wait for blocks does not hold up those behind it who fit into what is free: backfilling
(Lifka, "The ANL/IBM SP Scheduling System", 1995). For `PATIENCE` plans others pass it on equal terms. Who passes
it after that has a seat on loan, and gives it up as soon as the other fits in its place. So whoever is passed has
a seat at the latest when all those have ended who ran after `PATIENCE` plans, whatever comes meanwhile, if nobody
else goes before it by then.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.core.sequence import Sequence

PATIENCE = 64
"""Plans in which a sequence is passed on equal terms."""

MOST_PASSED = 8
"""Sequences that are passed in one plan: each takes a look at who could give way to it."""


class Passing:
    """Who is passed, since when, and who sits on loan."""

    def __init__(self) -> None:
        self._num_plans = 0
        self._since: dict[Sequence, int] = {}  # the plan in which each was first found not to fit
        self._loans: dict[Sequence, int] = {}  # the plan in which each got its seat, the newest last
        self._num_passed = 0
        self._is_lending = False

    def begin(self) -> None:
        """A new plan is begun."""
        self._num_plans += 1
        self._num_passed = 0
        self._is_lending = False

    def passed(self, sequence: Sequence) -> bool:
        """It does not fit; returns whether others may pass it."""
        since = self._since.setdefault(sequence, self._num_plans)
        self._is_lending |= self._num_plans - since >= PATIENCE
        self._num_passed += 1
        return self._num_passed < MOST_PASSED

    def seated(self, sequence: Sequence) -> None:
        """It got its seat, on loan if it passed somebody whose patience has ended."""
        self._since.pop(sequence, None)
        if self._is_lending:
            self._loans[sequence] = self._num_plans

    def loans(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those who sit where a waiting sequence would, the newest first."""
        if (since := self._since.get(sequence)) is not None:
            for borrower, plan in reversed(self._loans.items()):
                if plan - since < PATIENCE:
                    return
                yield borrower

    def forget(self, sequence: Sequence) -> None:
        """It has lost its seat, or ends."""
        self._loans.pop(sequence, None)
        self._since.pop(sequence, None)
