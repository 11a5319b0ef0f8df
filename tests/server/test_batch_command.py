"""`carousel batch` on the real model: killed and run again, bad lines, an engine of its own."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from server.batches.lines import OutputLine, id_of
from server.batches.output import Output, OutputError
from tests.server.conftest import MODEL
from tests.server.serving import CAROUSEL, Json, Server, carousel, environment

NUM_LINES = 40


def line(custom_id: str, url: str = "/v1/completions", **body: object) -> Json:
    asked = {"model": MODEL, "prompt": f"{custom_id} is", "max_tokens": 8, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked | body}


def write(path: Path, *lines: Json | str) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def read(path: Path) -> list[Json]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def kill_at(num_lines: int, output: Path, *arguments: str) -> None:
    """Run a batch until its output has so many whole lines, and kill it."""
    with subprocess.Popen(
        [CAROUSEL, "batch", *arguments], env=environment(), stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not output.exists() or output.read_bytes().count(b"\n") < num_lines:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()


def test_killed_twice_every_line_is_answered_once(server: Server, tmp_path: Path) -> None:
    lines = [line(f"line-{number}") for number in range(NUM_LINES)]
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    arguments = [str(source), str(output), "--url", server.url, "--concurrency", "2"]
    for num_lines in (5, 15):
        kill_at(num_lines, output, *arguments)
        num_answered = output.read_bytes().count(b"\n")
        assert num_answered < NUM_LINES
        with output.open("ab") as file:  # as a kill in the middle of a write leaves it
            file.write(b'{"id":"batch_req_9","cus')
    result = carousel("batch", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{NUM_LINES - num_answered} answered, 0 failed, {num_answered} skipped\n"
    answers = read(output)
    assert Counter(answer["custom_id"] for answer in answers) == Counter(asked["custom_id"] for asked in lines)
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"]
        assert answer["response"]["body"]["usage"]["completion_tokens"] == 8


def test_a_bad_line_gets_its_error_once_and_stops_no_other(server: Server, tmp_path: Path) -> None:
    lines: list[Json | str] = [
        line("good"),
        "{not JSON",
        line("good", prompt="Again"),
        line("elsewhere", url="/v1/moderations"),
        line("streamed", stream=True),
        line("refused", max_tokens=-2),
        '{"custom_id": "empty", "method": "POST", "url": "/v1/completions"}',
    ]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    last = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"model": MODEL} | chat}
    source, output = write(tmp_path / "in.jsonl", *lines, last), tmp_path / "out.jsonl"
    result = carousel("batch", str(source), str(output), "--url", server.url)
    assert (result.returncode, result.stdout) == (1, "2 answered, 6 failed, 0 skipped\n"), result.stderr
    answers = {answer["id"]: answer for answer in read(output)}
    assert len(answers) == len(lines) + 1
    codes = {number: answers[id_of(number)]["error"]["code"] for number in (2, 3, 4, 5, 7)}
    assert codes == {
        2: "invalid_json",
        3: "duplicate_custom_id",
        4: "invalid_url",
        5: "invalid_request",
        7: "invalid_request",
    }
    assert answers[id_of(7)]["custom_id"] == "empty"
    assert answers[id_of(6)]["response"]["status_code"] == 400
    assert answers[id_of(6)]["response"]["body"]["error"]["param"] == "max_tokens"
    assert answers[id_of(8)]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"

    before = output.read_bytes()
    result = carousel("batch", str(source), str(output), "--url", server.url)
    assert (result.returncode, result.stdout) == (1, "0 answered, 0 failed, 8 skipped\n")
    assert output.read_bytes() == before


def test_an_engine_of_its_own(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", line("one"), line("two")), tmp_path / "out.jsonl"
    result = carousel("batch", str(source), str(output), "--kv-cache-memory", "64MB")
    assert (result.returncode, result.stdout) == (0, "2 answered, 0 failed, 0 skipped\n"), result.stderr
    assert {answer["custom_id"] for answer in read(output)} == {"one", "two"}


def test_without_a_server_nothing_is_written(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", line("one")), tmp_path / "out.jsonl"
    result = carousel("batch", str(source), str(output), "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "http://127.0.0.1:9 does not answer" in result.stderr
    assert output.read_bytes() == b""


def test_a_file_that_is_no_output_stays_as_it_is(tmp_path: Path) -> None:
    source, notes = write(tmp_path / "in.jsonl", line("one")), tmp_path / "notes.txt"
    for content in ("My notes", "My notes\n"):
        notes.write_text(content)
        result = carousel("batch", str(source), str(notes), "--url", "http://127.0.0.1:9")
        assert result.returncode == 1
        assert "line 1 is not of a batch's output" in result.stderr
        assert notes.read_text() == content
    assert "is the input" in carousel("batch", str(source), str(source)).stderr


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Output(tmp_path / "out.jsonl") as output:
        output.write([OutputLine(id_of(1), "one")])
        with pytest.raises(OutputError, match="another"), Output(tmp_path / "out.jsonl"):
            pass
