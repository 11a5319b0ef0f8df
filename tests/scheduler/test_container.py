"""What a container lets this process have, read from a made-up tree of control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from scheduler.machine import container
from scheduler.models import loading
from scheduler.models.memory import free_memory


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")


def version_2(folder: Path, path: str, files: dict[str, str]) -> tuple[Path, Path]:
    write(folder, {"self": f"0::{path}", **{f"mount/{name}": content for name, content in files.items()}})
    return folder / "mount", folder / "self"


def version_1(folder: Path, path: str, files: dict[str, str]) -> tuple[Path, Path]:
    lines = f"9:name=systemd:/\n4:memory:{path}\n3:cpu,cpuacct:{path}\n0::/"
    write(folder, {"self": lines, **{f"mount/{name}": content for name, content in files.items()}})
    return folder / "mount", folder / "self"


def test_a_machine_without_groups_has_no_limits(tmp_path: Path) -> None:
    groups = (tmp_path / "mount", tmp_path / "self")
    assert container.cpu_quota(*groups) is None
    assert container.free_memory(*groups) is None


def test_version_2_in_a_container_that_sees_itself_at_the_top(tmp_path: Path) -> None:
    files = {
        "cpu.max": "150000 100000",
        "memory.max": "1000",
        "memory.current": "900",
        "memory.stat": "anon 200\nfile 700\nshmem 100\ninactive_anon 100\ninactive_file 450\nactive_file 150",
    }
    groups = version_2(tmp_path, "/", files)
    assert container.cpu_quota(*groups) == 1.5
    assert container.free_memory(*groups) == 1000 - (900 - 600), "what caches files is free, shared memory is not"


def test_version_2_counts_the_groups_above(tmp_path: Path) -> None:
    files = {
        "user.slice/cpu.max": "100000 100000",
        "user.slice/memory.max": "2000",
        "user.slice/memory.current": "1900",
        "user.slice/me.scope/cpu.max": "max 100000",
        "user.slice/me.scope/memory.max": "max",
        "user.slice/me.scope/memory.current": "10",
        "other.slice/cpu.max": "1000 100000",
    }
    groups = version_2(tmp_path, "/user.slice/me.scope", files)
    assert container.cpu_quota(*groups) == 1.0
    assert container.free_memory(*groups) == 100


def test_version_2_with_a_path_that_is_the_hosts(tmp_path: Path) -> None:
    groups = version_2(tmp_path, "/docker/0123", {"cpu.max": "50000 100000"})
    assert container.cpu_quota(*groups) == 0.5


@pytest.mark.parametrize("path", ["/docker/0123", "/"])
def test_version_1(tmp_path: Path, path: str) -> None:
    statistics = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100\ntotal_active_file 50"
    files = {
        f"cpu,cpuacct{path}/cpu.cfs_quota_us": "250000",
        f"cpu,cpuacct{path}/cpu.cfs_period_us": "100000",
        f"memory{path}/memory.limit_in_bytes": "1000",
        f"memory{path}/memory.usage_in_bytes": "700",
        f"memory{path}/memory.stat": statistics,
    }
    groups = version_1(tmp_path, path, files)
    assert container.cpu_quota(*groups) == 2.5
    assert container.free_memory(*groups) == 1000 - (700 - 150)


def test_version_1_without_limits(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    assert container.cpu_quota(*version_1(tmp_path, "/", files)) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (0.3, 1), (1.5, 2), (4.0, 4), (20.0, 8)])
def test_threads_follow_the_quota(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(loading, "cpu_quota", lambda: quota)
    assert loading.usable_cpus() == cores


def test_the_pool_stays_within_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "free_memory", lambda: 1234)
    assert free_memory(torch.device("cpu")) == 1234
    monkeypatch.setattr(container, "free_memory", lambda: 2**62)
    assert free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
