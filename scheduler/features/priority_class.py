"""Users' classes: who goes before whom, whatever their shares."""

from __future__ import annotations

import enum

from scheduler.core.request import Request

CLASS_DISTANCE = 1000
"""Between the priorities of two classes."""


class PriorityClass(enum.IntEnum):
    """A user's class; see fair.py and `PriorityFirst` for what it does."""

    HIGH = -1
    NORMAL = 0
    LOW = 1

    @classmethod
    def of(cls, request: Request) -> PriorityClass:
        """The class whose priority is nearest."""
        return cls(max(-1, min(1, round(request.priority / CLASS_DISTANCE))))
