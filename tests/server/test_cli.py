"""The `carousel` command on its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import ServeConfig
from tests.server.serving import CAROUSEL, carousel, environment


def test_help_explains_every_knob_and_its_default() -> None:
    help_text = carousel("serve", "--help").stdout
    for name, field in ServeConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in help_text
        assert " ".join(str(field.description).split()) in " ".join(help_text.split())
        if field.default is not None and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in " ".join(help_text.split())
    assert "--no-prefix-caching" in help_text
    assert "(default: on)" in help_text
    assert "--kv-cache-memory SIZE" in help_text


def test_the_commands_and_the_version_are_told() -> None:
    help_text = carousel("--help").stdout
    assert "serve" in help_text
    assert "generate" in help_text
    assert carousel("--version").stdout == "carousel 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["--port", "http"], {}, "--port should be a valid integer, got 'http'"),
        (["--port", "70000"], {}, "--port should be less than or equal to 65535"),
        (["--dtype", "int3"], {}, "--dtype should be 'auto', 'float32', 'bfloat16' or 'float16', got 'int3'"),
        (["--kv-cache-memory", "much"], {}, "--kv-cache-memory should be a size like 2GiB or 800MB"),
        (["--max-model-len", "1"], {}, "max_model_len must be at least 2"),
        ([], {"CAROUSEL_MAX_NUM_SEQS": "0"}, "--max-num-seqs should be greater than or equal to 1"),
        (["--colour", "red"], {}, "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(arguments: list[str], env: dict[str, str], message: str) -> None:
    run = carousel("serve", *arguments, env=env)
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1]


def test_every_wrong_value_gets_its_line() -> None:
    run = carousel("serve", "--port", "x", "--block-size", "y")
    assert len(run.stderr.splitlines()) == 2


def test_a_wrong_config_file(tmp_path: Path) -> None:
    run = carousel("serve", "--config", str(tmp_path / "none.yaml"))
    assert (run.returncode, run.stdout) == (1, "")
    assert "there is no such file" in run.stderr
    file = tmp_path / "carousel.yaml"
    file.write_text("colour: red")
    run = carousel("serve", "--config", str(file))
    assert run.returncode == 2
    assert run.stderr == "carousel serve: colour in the config file is not known here\n"


def test_generate_answers_whatever_the_model_and_the_language_are_called(model_path: str, tmp_path: Path) -> None:
    model = tmp_path / "modèle-é"
    model.symlink_to(model_path)
    flags = ("--model", str(model), "--dtype", "float32", "--max-tokens", "24")
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C"}
    run = carousel("generate", "What is the capital of France?", *flags, env=plain)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "The capital of France is Paris.\n"


def test_generate_refuses_what_cannot_be() -> None:
    run = carousel("generate", "Hello", "--temperature", "-1")
    assert run.returncode == 2
    assert run.stderr == "carousel generate: temperature must be between 0 and 100, got -1.0\n"


def test_generate_raw_continues_until_ctrl_c() -> None:
    with subprocess.Popen(
        [CAROUSEL, "generate", "--raw", "One, two, three,", "--dtype", "float32", "--max-tokens", "4000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b" four"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("module", ["server.commands.main", "server.app", "server.serving"])
def test_the_http_process_never_loads_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_help_needs_no_http_server() -> None:
    code = "import sys, server.commands.main; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
