"""`carousel doctor`, and what the command says of other people's packages."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.server.serving import CAROUSEL, carousel


def run(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [str(CAROUSEL), *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_what_it_tells() -> None:
    told = json.loads(carousel("doctor", "--json").stdout)
    assert told["has_kernels"]
    assert told["instruction_set"] in told["kernels"]
    assert told["usable_cores"] <= told["cores"]
    assert 0 < told["free_memory"] <= told["memory"]
    assert min(told["speed"].values()) > 0
    screen = carousel("doctor").stdout
    for part in (told["processor"], told["torch"], told["files"], "GB/s"):
        assert part in screen


def test_a_package_of_the_same_name_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "scheduler-0.8.8.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: scheduler\nVersion: 0.8.8\n")
    (folder / "RECORD").write_text("scheduler/__init__.py,,\nscheduler-0.8.8.dist-info/METADATA,,\n")
    started = run("generate", "hello", path=tmp_path)
    assert started.returncode == 1
    assert "scheduler 0.8.8 is another project" in started.stderr
    assert "pip uninstall scheduler" in started.stderr
    assert "scheduler 0.8.8 is another project" in run("doctor", path=tmp_path).stdout
