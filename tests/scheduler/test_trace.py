"""Traces: events that a viewer accepts, that nest, and that account for the steps' time."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from scheduler.config import EngineConfig
from scheduler.observing.trace import Recording, TraceFile
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.engine_runs import ANY, Run, run_all

Event = dict[str, Any]
NUM_STEPS = 200


@pytest.fixture(scope="module")
def traced(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], list[Event], Run]:
    """A run with preemptions: the events of its first 200 steps, those in its trace file, and its record."""
    core = EngineCore(EngineConfig(kv_cache_memory="20MB", max_model_len=300, longest_step_ms=ANY), model_path)
    file = tmp_path_factory.mktemp("trace") / "trace.json"
    recording, trace = Recording(NUM_STEPS), TraceFile(file)
    core.observers += [recording, trace]
    prompts = [[(17 * row + place) % 1000 + 10 for place in range(100)] for row in range(16)]
    run = run_all(core, prompts, SamplingParams(temperature=0, seed=0, max_tokens=120, ignore_eos=True))
    trace.close()
    assert recording.is_done
    assert run.num_preemptions > 0
    return json.loads(recording.encode()), json.loads(Path(file).read_text()), run


def spans(events: list[Event], prefix: str = "") -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["name"].startswith(prefix)]


def test_every_event_is_one_that_viewers_know(traced: tuple[list[Event], list[Event], Run]) -> None:
    for events in traced[:2]:
        for event in events:
            assert {"name", "ph", "pid", "tid"} <= event.keys()
            assert event["ph"] in {"X", "i", "M", "b", "e"}
            if event["ph"] != "M":
                assert event["ts"] >= 0
            if event["ph"] == "X":
                assert event["dur"] >= 0


def test_the_steps_are_all_there_and_their_phases_fill_them(traced: tuple[list[Event], list[Event], Run]) -> None:
    recorded, in_file, run = traced
    assert len(spans(in_file, "step ")) == len(run.steps)
    steps = spans(recorded, "step ")
    assert len(steps) == NUM_STEPS
    phases = [event for name in ("plan", "execute", "sample", "commit") for event in spans(recorded, name)]
    for step in steps:
        inside = [each for each in phases if step["ts"] <= each["ts"] < step["ts"] + step["dur"]]
        assert len(inside) == 4
        assert sum(each["dur"] for each in inside) == pytest.approx(step["dur"], rel=0.01, abs=1)


def test_on_each_track_spans_nest_or_follow_each_other(traced: tuple[list[Event], list[Event], Run]) -> None:
    tracks: dict[int, list[Event]] = defaultdict(list)
    for event in spans(traced[1]):
        tracks[event["tid"]].append(event)
    assert len(tracks) > 2
    for events in tracks.values():
        open_ends: list[float] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while open_ends and open_ends[-1] <= event["ts"] + 1:
                open_ends.pop()
            assert not open_ends or event["ts"] + event["dur"] <= open_ends[-1] + 1
            open_ends.append(event["ts"] + event["dur"])


def test_a_preemption_shows_and_the_request_says_how_often(traced: tuple[list[Event], list[Event], Run]) -> None:
    events = traced[1]
    preempted = [event["name"] for event in events if event["ph"] == "i"]
    assert len(preempted) == traced[2].num_preemptions
    lives = {
        event["name"]: event["args"] for event in events if event["ph"] == "b" and event["name"] == event["id"]
    }
    assert len(lives) == 16
    assert sum(life["preemptions"] for life in lives.values()) == len(preempted)


def test_a_requests_spans_open_and_close(traced: tuple[list[Event], list[Event], Run]) -> None:
    open_spans: dict[tuple[str, str], float] = {}
    for event in traced[1]:
        key = (event.get("id", ""), event["name"])
        if event["ph"] == "b":
            open_spans[key] = event["ts"]
        elif event["ph"] == "e":
            assert event["ts"] >= open_spans.pop(key)
    assert not open_spans
