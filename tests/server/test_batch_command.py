"""`carousel batch`: every line answered once, whatever happens meanwhile."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.batches.lines import Answered, AnswerFile, NoAnswerFileError
from tests.server.serving import CAROUSEL, Server, carousel, environment

Json = dict[str, Any]


def line(number: int, **body: Any) -> Json:
    body = {"prompt": f"{number} is", "max_tokens": 2, "temperature": 0} | body
    return {"custom_id": f"n{number}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, lines: list[Json | str]) -> None:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))


def answers(path: Path) -> list[Json]:
    return [json.loads(each) for each in path.read_text().splitlines()]


def test_a_batch_that_is_killed_twice_answers_every_line_once(tmp_path: Path, server: Server) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [line(number, max_tokens=24, ignore_eos=True) for number in range(60)])
    command = [str(CAROUSEL), "batch", str(source), str(target), "--url", server.url, "--concurrency", "4"]
    for part in (10, 25):
        process = subprocess.Popen(
            command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while not (target.exists() and target.read_text().count("\n") >= part):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        with target.open("a") as file:
            file.write('{"id":"batch_req_1","custom_id":"n5')  # as a kill within a line leaves it
    done = carousel("batch", str(source), str(target), "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60 answered, 0 failed")
    assert "60/60" in done.stderr
    found = answers(target)
    assert Counter(each["custom_id"] for each in found) == {f"n{number}": 1 for number in range(60)}
    assert all(each["response"]["body"]["usage"]["completion_tokens"] == 24 for each in found)


def test_with_a_server_of_its_own_and_lines_that_are_none(tmp_path: Path, model_path: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}
    lines: list[Json | str] = [
        line(0),
        "{",
        line(0),
        "",
        {"custom_id": "elsewhere", "method": "POST", "url": "/v1/images", "body": {}},
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat | {"temperature": 0}},
        line(9, max_tokens=-1),
    ]
    write(source, lines)
    done = carousel("batch", str(source), str(target), "--kv-cache-memory", "64MB")
    assert done.returncode == 1
    assert done.stdout.startswith("2 answered, 4 failed, 0 of them before")
    found = {each["custom_id"]: each for each in answers(target)}
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"]
    assert found["chat"]["response"]["request_id"]
    assert found["n9"]["response"]["status_code"] == 400
    assert {name: each["error"]["code"] for name, each in found.items() if each["error"]} == {
        "line-2": "invalid_line",
        "line-3": "duplicate_custom_id",
        "elsewhere": "invalid_url",
    }
    again = carousel("batch", str(source), str(target), "--url", "http://127.0.0.1:1")
    assert again.stdout.startswith("2 answered, 4 failed, 6 of them before"), "nothing is left to ask"


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [line(1)])
    done = carousel(
        "batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:1"
    )
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert "run the command again" in done.stderr
    assert "Traceback" not in done.stderr


TORN = [b"", b'{"id"', b'{"id":"batch_req_b","custom_id":"x","response":null,"error":null}']


@pytest.mark.parametrize("torn", TORN)
def test_what_is_torn_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    file = AnswerFile(path)
    file.write(Answered.with_problem("a", "code", "message"))
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert AnswerFile(path).done == {"a"}
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"a text\n", b"a text", b'{"custom_id": "n1", "url": "/v1/completions"}\n'])
def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(NoAnswerFileError, match="not the output of a batch"):
        AnswerFile(path)
    assert path.read_bytes() == content


def test_the_input_is_not_the_output(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write(path, [line(1)])
    before = path.read_bytes()
    done = carousel("batch", str(path), str(path), "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "is not the output of a batch" in done.stderr
    assert path.read_bytes() == before
