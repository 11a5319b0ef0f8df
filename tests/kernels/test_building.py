"""How the kernels become a library: what a stopped build leaves, what a wheel brings, and what they need."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from scheduler.kernels import building, native
from scheduler.kernels.building import NativeBuildError, build
from scheduler.machine.processor import instruction_set

RIGHT = 'extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n'


def test_a_build_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text(RIGHT)
    (sources / "two.cpp").write_text("int two( { return 2; }\n")
    monkeypatch.setattr(building, "SOURCES", sources)
    target = tmp_path / "library.so"
    with pytest.raises(NativeBuildError, match=r"two.cpp"):
        build(target, "portable", lambda count, total: None)
    assert not target.exists()
    (kept,) = tmp_path.rglob("one.*.o")
    compiled = kept.stat().st_mtime_ns
    (sources / "two.cpp").write_text("int two() { return 2; }\n")
    told: list[tuple[int, int]] = []
    seen: list[int] = []

    def tell(count: int, total: int) -> None:
        told.append((count, total))
        seen.append(kept.stat().st_mtime_ns)

    build(target, "portable", tell)
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert set(seen) == {compiled}, "what was there is not compiled again"
    assert ctypes.CDLL(str(target)).one() == 1
    assert not list(tmp_path.rglob("*.o")), "nothing but the library is kept"


def test_what_a_wheel_brings_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = tmp_path / f"{instruction_set()}.of-a-wheel.so"
    shutil.copyfile(native.kernels().file, brought)
    monkeypatch.setattr(native, "PREBUILT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    loaded = native.load(instruction_set())
    assert (loaded.file, loaded.version) == (brought, brought.stem)


def test_without_a_compiler_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"no-such-compiler.*not on the PATH"):
        native.load(instruction_set())


def test_a_library_needs_the_c_library_alone() -> None:
    needed = subprocess.run(["ldd", str(native.kernels().file)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2].partition(".so")[0] for line in needed.splitlines()}
    assert names <= {"linux-vdso", "libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
