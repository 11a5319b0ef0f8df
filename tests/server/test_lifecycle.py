"""How a server begins and ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from tests.server.conftest import MODEL
from tests.server.serving import CAROUSEL, Server, carousel, environment


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.prove)])
def test_a_signal_ends_it_cleanly_with_streams_in_flight(tmp_path: Path, number: signal.Signals) -> None:
    with Server(tmp_path / "log", "--dtype", "float32") as server, server.client() as client:
        engine_process = server.engine_process
        streams = [
            client.completions.create(
                model=MODEL, prompt="On and", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(3)
        ]
        for stream in streams:
            next(stream)
        assert server.stop(number) == 0
        assert not engine_process.is_running()
        assert "Traceback" not in server.log
        for stream in streams:
            with pytest.raises(openai.APIConnectionError):
                list(stream)


def test_a_signal_during_the_start_ends_it_cleanly() -> None:
    with subprocess.Popen(
        [CAROUSEL, "serve", "--port", "0"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not psutil.Process(process.pid).children():  # the engine's process
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == ""
    assert "Traceback" not in log


@pytest.mark.parametrize("pause", [0.0, 0.005, 0.02])
def test_two_signals_during_the_start_leave_nothing(tmp_path: Path, pause: float) -> None:
    with subprocess.Popen(
        [CAROUSEL, "serve", "--port", "0"], env=environment({"TMPDIR": str(tmp_path)}), stderr=subprocess.PIPE
    ) as process:
        while not (children := psutil.Process(process.pid).children()):  # the engine's process
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert b"Traceback" not in log
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert list(tmp_path.iterdir()) == []


def answer(server: Server, **more: Any) -> Iterator[str]:
    """A stream's text, piece by piece."""
    wishes: dict[str, Any] = {"prompt": "On and", "max_tokens": 120, "seed": 3, **more}
    with server.client() as client:
        stream = client.completions.create(model=MODEL, stream=True, **wishes, extra_body={"ignore_eos": True})
        for chunk in stream:
            yield chunk.choices[0].text


@pytest.mark.prove
async def test_when_the_engine_dies_streams_go_on(tmp_path: Path) -> None:
    """And signals to all of its process group do it no harm."""
    with Server(tmp_path / "log", "--dtype", "float32") as server:
        expected = "".join(answer(server))
        engine_process = server.engine_process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            engine_process.send_signal(number)
        streams = [answer(server) for _ in range(3)]
        texts = [next(stream) for stream in streams]
        engine_process.kill()
        status, body = await server.get("/health/ready")
        while status == 200:  # it has not been noticed yet
            status, body = await server.get("/health/ready")
        assert status == 503
        assert "was ended by signal 9; its log says more; a new one is starting" in body["error"]["message"]
        assert (await server.get("/health/live"))[0] == 200
        assert await server.metric("carousel_engine_up") == 0
        assert await server.metric("carousel_requests_running") == 0
        assert [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)] == [expected] * 3
        assert (await server.get("/health/ready"))[0] == 200
        assert await server.metric("carousel_engine_lost_total") == 1
        assert server.stop(signal.SIGTERM) == 0


@pytest.mark.prove
async def test_what_runs_is_finished_at_the_end(tmp_path: Path) -> None:
    with Server(tmp_path / "log", env={"CAROUSEL_DRAIN_TIMEOUT": "60"}) as server:
        expected = "".join(answer(server, max_tokens=600))
        streams = [answer(server, max_tokens=600) for _ in range(4)]
        texts = [next(stream) for stream in streams]
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while (await server.get("/health/ready"))[0] == 200:
                await asyncio.sleep(0.01)
        status, body = await server.post("/v1/completions", {"prompt": "Once"})
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        assert [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)] == [expected] * 4
        assert server.process.wait(timeout=30) == 0


@pytest.mark.prove
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with Server(tmp_path / "log", env={"CAROUSEL_DRAIN_TIMEOUT": "60"}) as server:
        engine_process = server.engine_process
        stream = answer(server, max_tokens=4000)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        while "once more ends it now" not in server.log:
            time.sleep(0.02)
        assert server.stop(signal.SIGTERM) == -signal.SIGTERM
        time.sleep(1)
        assert not is_alive(engine_process)


def is_alive(process: psutil.Process) -> bool:
    """What nobody waits for stays in the table of processes when it has ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5, 3.0])
def test_an_engine_does_not_outlive_its_server(tmp_path: Path, seconds: float) -> None:
    """At no moment of its start."""
    command = [str(CAROUSEL), "serve", "--port", "0", "--dtype", "float32"]
    env = environment({"TMPDIR": str(tmp_path)})
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (children := psutil.Process(process.pid).children()):
            time.sleep(0.02)
        time.sleep(seconds)
        process.kill()
        deadline = time.monotonic() + 2
        while any(is_alive(child) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("carousel-")]


async def test_while_the_engine_starts_the_server_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Server(tmp_path / "log", "--port", str(port))
    answers: set[tuple[int, str | None]] = set()
    statuses: set[int] = set()
    is_listening = False

    async def look() -> None:
        nonlocal is_listening
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            while True:
                try:
                    async with session.get("/health/live") as live, session.get("/health/ready") as ready:
                        is_listening = True
                        statuses.add(live.status)
                        answers.add((ready.status, ready.headers.get("Retry-After")))
                except aiohttp.ClientConnectorError:
                    assert not is_listening, "it listened, and then refused a connection"
                await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    await asyncio.to_thread(server.__enter__)
    await asyncio.sleep(0.2)
    assert not looking.done()
    looking.cancel()
    server.__exit__()
    assert answers == {(503, "5"), (200, None)}
    assert statuses == {200}


async def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "carousel.yaml"
    file.write_text("served_model_name: from-file\nmax_model_len: 100\nmax_num_seqs: 3\nlog_level: warning\n")
    env = {
        "CAROUSEL_CONFIG": str(file),
        "CAROUSEL_SERVED_MODEL_NAME": "from-environment",
        "CAROUSEL_MAX_MODEL_LEN": "200",
    }
    flags = ["--served-model-name", "from-flag"]
    with Server(tmp_path / "log", *flags, env=env) as server:
        status, models = await server.get("/v1/models")
        assert status == 200
        (model,) = models["data"]
        assert model["id"] == "from-flag"
        assert model["max_model_len"] == 200
        assert "GET /v1/models" not in server.log, "the file's log_level holds"


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = carousel("serve", "--port", str(port))
    assert run.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in run.stderr
    assert "--port" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    run = carousel("serve", "--port", "0", "--model", str(tmp_path / "nothing"))
    assert run.returncode == 1
    assert "nothing" in run.stderr
    assert "Traceback" not in run.stderr
