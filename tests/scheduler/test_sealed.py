"""Files that are trusted because of a sum beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from scheduler.kernels.native import kernels
from scheduler.sealed import is_sealed, seal


def test_a_file_is_trusted_while_it_is_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert not is_sealed(file)
    file.write_bytes(b"content")
    assert not is_sealed(file), "nobody has said that it is whole"
    seal(file)
    assert is_sealed(file)
    for content in (b"", b"conten", b"contend"):
        file.write_bytes(content)
        assert not is_sealed(file)
    file.unlink()
    assert not is_sealed(file)


@pytest.mark.prove  # a build takes from half a minute to two
@pytest.mark.parametrize("kept", [0, 5000])
def test_kernels_that_are_cut_off_are_built_anew(tmp_path: Path, kept: int) -> None:
    """The mark `complete` of earlier versions was there in such a case too."""
    kernels()
    cached = platformdirs.user_cache_path("carousel") / "kernels"
    shutil.copytree(cached, tmp_path / "carousel" / "kernels")
    for library in tmp_path.rglob("*.so"):
        os.truncate(library, kept)
    command = [sys.executable, "-c", "from scheduler.kernels.native import kernels; print(kernels().version)"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for builds in (True, False):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == kernels().version
        assert ("building the native kernels" in result.stderr) == builds
