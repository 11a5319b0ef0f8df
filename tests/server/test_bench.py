"""`carousel bench` against a real server: closed and open loop, and what it reports."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest

from server.bench.report import Slo
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
