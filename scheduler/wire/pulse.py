"""The engine's pulse: a small piece of shared memory in which its process shows that it lives, and what it is at.

Memory, and not messages: what a process had in hand when it died can still be read, and one that hangs need not
cooperate. A thread of its own beats: the beat says that the process runs, the step's start that it gets on.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

SIZE = 256 * 1024

BEAT_SECONDS = 0.25
"""Between two signs of life."""

_BEAT = struct.Struct("<d")
_WORK = struct.Struct("<ddQI")  # started, limit, number, length of what is in hand
_WORK_AT = _BEAT.size
_IN_HAND_AT = _WORK_AT + _WORK.size


def new_pulse_file() -> int:
    """A file descriptor to share, of a file that has no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("carousel-pulse")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, SIZE)
    return descriptor


class Work(NamedTuple):
    """What the engine is at."""

    number: int
    """Of the step, counted from the engine's start."""
    started: float
    """On the monotonic clock, which all processes share."""
    limit: float
    """Seconds after which it has to be taken for hanging."""


class Pulse:
    """Both ends of it: one process writes, the other reads."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE)
        os.close(descriptor)
        self._number = 0

    def beat(self) -> None:
        """A sign of life."""
        _BEAT.pack_into(self._memory, 0, time.monotonic())

    def begin(self, in_hand: Sequence[str], limit: float) -> None:
        """Work on these requests begins."""
        data = msgspec.msgpack.encode(in_hand)
        if len(data) > SIZE - _IN_HAND_AT:
            data = msgspec.msgpack.encode([])
        # Their names first, so that what is said to be in hand is never what was.
        _WORK.pack_into(self._memory, _WORK_AT, 0.0, 0.0, self._number, 0)
        self._memory[_IN_HAND_AT : _IN_HAND_AT + len(data)] = data
        self._number += 1
        _WORK.pack_into(self._memory, _WORK_AT, time.monotonic(), limit, self._number, len(data))

    def end(self) -> None:
        """It is done."""
        _WORK.pack_into(self._memory, _WORK_AT, 0.0, 0.0, self._number, 0)

    @property
    def last_beat(self) -> float:
        """On the monotonic clock; 0: none yet."""
        beat: float = _BEAT.unpack_from(self._memory, 0)[0]
        return beat

    @property
    def work(self) -> Work | None:
        """None: nothing is being worked on, or it is being written what. The other process goes on meanwhile."""
        started, limit, number, length = _WORK.unpack_from(self._memory, _WORK_AT)
        return Work(number, started, limit) if started and limit and length else None

    @property
    def in_hand(self) -> list[str]:
        """The requests in it. To be read only when the other process has ended: it writes them at every step."""
        length = _WORK.unpack_from(self._memory, _WORK_AT)[3]
        if length == 0:
            return []
        return msgspec.msgpack.decode(self._memory[_IN_HAND_AT : _IN_HAND_AT + length], type=list[str])

    def close(self) -> None:
        self._memory.close()
