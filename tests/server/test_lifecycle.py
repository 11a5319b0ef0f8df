"""How a server begins and ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import openai
import psutil
import pytest

from tests.server.conftest import MODEL
from tests.server.serving import CAROUSEL, Server, carousel, environment


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


async def test_when_the_engine_dies_clients_are_told(tmp_path: Path) -> None:
    with Server(tmp_path / "log", "--dtype", "float32") as server, server.client() as client:
        assert await server.get("/health") == (200, {"status": "ok"})
        stream = client.completions.create(
            model=MODEL, prompt="On and", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.engine_process.kill()
        with pytest.raises(openai.APIError, match="the engine's process ended unexpectedly"):
            list(stream)
        status, answer = await server.get("/health")
        assert status == 503
        assert "ended unexpectedly" in answer["error"]["message"]
        assert await server.metric("carousel_engine_up") == 0
        with pytest.raises(openai.InternalServerError, match="ended unexpectedly") as refused:
            client.completions.create(model=MODEL, prompt="Anyone there?")
        assert refused.value.status_code == 503
        assert server.stop(signal.SIGTERM) == 0


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
