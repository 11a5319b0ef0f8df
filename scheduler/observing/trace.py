"""Chrome trace events of what the engine did: open the file in Perfetto, or in chrome://tracing.

One track has the steps, each with its phases below it; one track a seat says who sat there and what was computed
for them; and every request is a span of its own from arrival to end, with its waiting, prefill and decoding in it.
The format is Google's Trace Event Format.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from scheduler.core.plan import Plan
from scheduler.core.sequence import Sequence
from scheduler.wire.messages import StepStats

_STEPS, _FIRST_SEAT = 1, 10
"""Track numbers."""

Event = dict[str, Any]


class StepTrace:
    """Turns steps into events. Times are seconds on the monotonic clock; the events' are microseconds."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._num_steps = 0
        self._named: set[int] = set()

    def step(self, plan: Plan, started: float, stats: StepStats, ended: Iterable[Sequence]) -> list[Event]:
        """The events of one step that began at `started`; `ended` are the sequences that it ended."""
        self._num_steps += 1
        events = self._names(plan)
        counts = {
            "tokens": stats.num_tokens,
            "prompt tokens": stats.num_prompt_tokens,
            "sampled": stats.num_sampled_tokens,
            "preempted": [_name(sequence) for sequence in plan.preempted],
        }
        events.append(self._span(f"step {self._num_steps}", _STEPS, started, stats.duration, counts))
        at = started
        for phase in ("plan", "execute", "sample", "commit"):
            duration: float = getattr(stats.phases, phase)
            events.append(self._span(phase, _STEPS, at, duration))
            at += duration
        executing = started + stats.phases.plan
        for chunk in plan.chunks:
            sequence = chunk.sequence
            kind = "decode" if chunk.length == 1 and chunk.start >= sequence.num_prompt_tokens else "prefill"
            what = {"tokens": [chunk.start, chunk.end], "user": sequence.request.user}
            name = f"{kind} {_name(sequence)}"
            events.append(self._span(name, _FIRST_SEAT + chunk.seat, executing, stats.phases.execute, what))
        for sequence in plan.preempted:
            events.append(self._instant(f"preempted {_name(sequence)}", started))
        for sequence in ended:
            events += self._life(sequence, started + stats.duration)
        return events

    def _names(self, plan: Plan) -> list[Event]:
        """Name the tracks that are seen for the first time."""
        tracks = {_STEPS: "steps"}
        tracks |= {_FIRST_SEAT + chunk.seat: f"seat {chunk.seat}" for chunk in plan.chunks}
        new = {track: name for track, name in tracks.items() if track not in self._named}
        self._named.update(new)
        return [
            {"name": "thread_name", "ph": "M", "pid": self._pid, "tid": track, "args": {"name": name}}
            for track, name in new.items()
        ]

    def _span(self, name: str, track: int, start: float, duration: float, args: Event | None = None) -> Event:
        event = {"name": name, "ph": "X", "pid": self._pid, "tid": track, "ts": 1e6 * start, "dur": 1e6 * duration}
        return event | ({"args": args} if args else {})

    def _instant(self, name: str, at: float) -> Event:
        return {"name": name, "ph": "i", "s": "p", "pid": self._pid, "tid": _STEPS, "ts": 1e6 * at}

    def _life(self, sequence: Sequence, end: float) -> list[Event]:
        """A sequence from its request's arrival on, as nested asynchronous spans."""
        arrival = sequence.request.arrival_time
        seated = end if sequence.seated_time is None else sequence.seated_time
        first = end if sequence.first_token_time is None else sequence.first_token_time
        spans = [
            (_name(sequence), arrival, end),
            ("waiting", arrival, seated),
            ("prefill", seated, first),
            ("decoding", first, end),
        ]
        args = {
            "user": sequence.request.user,
            "prompt tokens": sequence.num_prompt_tokens,
            "cached": sequence.num_cached_tokens,
            "output tokens": sequence.num_output_tokens,
            "preemptions": sequence.num_preemptions,
            "finish reason": sequence.finish_reason,
        }
        same: Event = {"cat": "request", "id": _name(sequence), "pid": self._pid, "tid": 0}
        events = []
        for name, begin, finish in spans:
            events.append({"name": name, "ph": "b", "ts": 1e6 * begin, **same, "args": args})
            events.append({"name": name, "ph": "e", "ts": 1e6 * finish, **same})
        return events


def _name(sequence: Sequence) -> str:
    return f"{sequence.request.request_id}/{sequence.index}"


class Recording:
    """The events of the next `num_steps` steps, kept in memory."""

    def __init__(self, num_steps: int) -> None:
        self._remaining = num_steps
        self._trace = StepTrace()
        self._events: list[Event] = []

    @property
    def is_done(self) -> bool:
        return self._remaining == 0

    def step(self, plan: Plan, started: float, stats: StepStats, ended: Iterable[Sequence]) -> None:
        if not self.is_done:
            self._events += self._trace.step(plan, started, stats, ended)
            self._remaining -= 1

    def encode(self) -> bytes:
        """A JSON array of all events so far."""
        return msgspec.json.encode(self._events)


class TraceFile:
    """A trace that grows on disk: an array of events. Viewers accept it without its end, should the engine die."""

    def __init__(self, path: Path) -> None:
        # It says who was served when: for its owner alone, if it is not there already.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._file.write(b"[\n")
        self._trace = StepTrace()
        self._separator = b""

    def step(self, plan: Plan, started: float, stats: StepStats, ended: Iterable[Sequence]) -> None:
        for event in self._trace.step(plan, started, stats, ended):
            self._file.write(self._separator + msgspec.json.encode(event))
            self._separator = b",\n"
        self._file.flush()

    def close(self) -> None:
        self._file.write(b"\n]\n")
        self._file.close()
