"""`carousel bench` against a real server: closed and open loop, and what it reports."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from pathlib import Path

import pytest

from benchmarks.asked import asked, prompts
from benchmarks.kept import Kept, Turn
from scheduler.config import DEFAULT_MODEL
from server.bench.load import CHAT, LoadClient, Outcome, RunResult
from server.bench.report import Slo, circles, summarise
from server.bench.workload import (
    WORKLOADS,
    LoadRequest,
    WorkloadError,
    arrival_times,
    make_requests,
    read_requests,
)
from tests.server.serving import Server, carousel


def test_closed_loop(server: Server, tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    result = carousel(
        *("bench", "--url", server.url, "--concurrency", "1,3", "--requests", "4"),
        *("--slo-ttft-ms", "60000", "--json", str(figures), "--picture", str(picture)),
    )
    assert result.returncode == 0, result.stderr
    assert "out tok/s" in result.stdout
    one, three = json.loads(figures.read_text())
    wanted = sum(request.max_tokens for request in make_requests("chat", 4, seed=0))
    for run in (one, three):
        assert run["num_errors"] == 0
        assert run["output_tokens_per_second"] * run["duration"] == pytest.approx(wanted)
        assert run["goodput"] == pytest.approx(run["requests_per_second"])
    assert picture.stat().st_size > 10_000


def test_answers_may_end_by_themselves(server: Server, tmp_path: Path) -> None:
    file, figures = tmp_path / "requests.jsonl", tmp_path / "figures.json"
    lines = [{"prompt": "Say yes.", "max_tokens": 200, "seed": number} for number in range(4)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    how = ("--endpoint", "chat", "--temperature", "0.7", "--may-end")
    result = carousel(
        *("bench", "--url", server.url, "--concurrency", "4", "--file", str(file), *how, "--json", str(figures)),
    )
    assert result.returncode == 0, result.stderr
    (run,) = json.loads(figures.read_text())
    assert 0 < run["output_tokens_per_second"] * run["duration"] < 4 * 200
    assert 0 <= run["circles"] < 0.5


def test_chats_are_real_text_with_seeds(server: Server) -> None:
    client = LoadClient(server.url, DEFAULT_MODEL).chatting()
    assert client.sampling == CHAT
    once, again, other = (
        [outcome.text for outcome in asyncio.run(client.closed_loop(asked(2, seed=seed, most=12), 1)).outcomes]
        for seed in (0, 0, 1)
    )
    assert once == again != other


def test_each_text_is_asked_once_before_one_comes_again() -> None:
    requests = asked(2 * len(prompts()), seed=1, num_users=2)
    first, second = requests[: len(prompts())], requests[len(prompts()) :]
    assert {each.prompt for each in first} == {each.prompt for each in second} == set(prompts())
    assert len(prompts()) > 100
    assert len({each.seed for each in requests}) == len(requests)
    assert len({each.system for each in requests}) > len(prompts())
    assert requests == asked(2 * len(prompts()), seed=1, num_users=2)


def test_circles_are_counted_within_each_answer() -> None:
    line = "the cat sat on the mat and then it slept"
    assert circles([]) == circles(["too short"]) == circles([line, line]) == 0
    assert circles([f"{line} {line}"]) == pytest.approx(3 / 13)  # the last three runs of eight words
    assert circles(["no " * 100]) == pytest.approx(92 / 93)
    outcome = Outcome(0, 0.0, [1.0], 1.0, num_tokens=100, text="no " * 100)
    assert summarise("C=1", RunResult([outcome], 1.0), Slo()).circles == pytest.approx(92 / 93)


def test_turns_are_kept(tmp_path: Path) -> None:
    result = RunResult([Outcome(0, 0.5, [0.6, 0.7], 0.8, num_tokens=2, text="a b")], 0.8)
    turns = [Turn(server, 8, number, "as ever", None, result) for server in ("one", "two") for number in (0, 1)]
    kept = Kept(tmp_path / "turns" / "a.jsonl", "as ever")
    for turn in turns:
        kept.add(turn)
    again = Kept(tmp_path / "turns" / "a.jsonl", "as ever")
    assert again.of("one", 8) == turns[:2]
    assert again.of("one", 1) == []
    assert Kept(tmp_path / "turns" / "a.jsonl", "another way").of("one", 8) == []
    again.forget(["one"])
    with (tmp_path / "turns" / "a.jsonl").open("a") as file:
        file.write('{"server":"two","conc')  # it was killed as it wrote
    left = Kept(tmp_path / "turns" / "a.jsonl", "as ever")
    assert left.of("one", 8) == []
    assert left.of("two", 8) == turns[2:]


def test_open_loop_from_a_trace(server: Server, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt": "One two three", "max_tokens": 3, "timestamp": number / 10} for number in range(4)]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    result = carousel("bench", "--url", server.url, "--file", str(trace), "--arrivals", "trace")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1].split()[:3] == ["trace", "4", "0"]


def test_no_server_is_a_clear_error() -> None:
    result = carousel("bench", "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "no OpenAI-compatible server answers at http://127.0.0.1:9" in result.stderr


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_repeats_a_workload(workload: str) -> None:
    requests = make_requests(workload, 12, seed=3, num_users=2)
    assert requests == make_requests(workload, 12, seed=3, num_users=2)
    assert requests != make_requests(workload, 12, seed=4, num_users=2)
    assert [request.user for request in requests] == [0, 1] * 6


@pytest.mark.parametrize("process", ["poisson", "bursty", "constant"])
def test_arrivals_have_the_asked_rate(process: str) -> None:
    times = list(arrival_times(process, [LoadRequest("", 1)] * 4000, rate=5, seed=0))
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(5, rel=0.15)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    variation = {"constant": 0.0, "poisson": 1.0, "bursty": 2.0}[process]
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, abs=0.25)


def test_a_conversation_repeats_what_came_before() -> None:
    turns = make_requests("multi-turn", 4, seed=0)
    for before, after in itertools.pairwise(turns):
        assert after.prompt.startswith(before.prompt)


def test_a_broken_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 1}\n{"prompt": "b"}\n')
    with pytest.raises(WorkloadError, match="line 2"):
        read_requests(file)


def test_goodput_counts_what_keeps_the_slo() -> None:
    slo = Slo(ttft=0.5, itl=0.1)
    assert slo.is_kept(0.4, [0.05, 0.14])
    assert not slo.is_kept(0.6, [0.05])
    assert not slo.is_kept(0.4, [0.1, 0.2])
