"""Finding a model by name: fetched and described once, checked, and clear about what is missing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.config import DEFAULT_MODEL
from scheduler.kernels import native
from scheduler.machine.processor import instruction_set
from scheduler.models.files import fetching, model_source
from scheduler.models.files.model_source import ModelNotFoundError, models_folder, resolve_model

RESOLVE = (
    "import logging; logging.basicConfig(level=logging.INFO); "
    f"from scheduler.models.files.model_source import resolve_model; print(resolve_model({DEFAULT_MODEL!r})); "
    f"import sys; print('torch' in sys.modules)"
)


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RESOLVE],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.prove
def test_two_first_starts_at_once_fetch_once(tmp_path: Path) -> None:
    processes = [start(tmp_path), start(tmp_path)]
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    folders = {out.splitlines()[0] for out, _ in results}
    assert folders == {str(tmp_path / "carousel" / "models" / DEFAULT_MODEL)}
    assert sorted("fetching" in err for _, err in results) == [False, True], "the other found it done"
    loaded_torch = [out.splitlines()[1] for out, _ in results]
    assert loaded_torch == ["False", "False"], "it was described in a process that has ended"


def test_a_later_start_is_offline(model_path: str) -> None:
    process = start(models_folder().parent.parent, PIP_NO_INDEX="1", HF_HUB_OFFLINE="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines() == [model_path, "False"]


def copy_of_the_cache(model_path: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default model's folder in a cache of its own, which becomes the user's; the network is out of reach."""
    folder = cache / "carousel" / "models" / DEFAULT_MODEL
    shutil.copytree(model_path, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    return folder


def test_a_damaged_cache_is_noticed_and_offline_it_says_what_to_do(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of_the_cache(model_path, tmp_path, monkeypatch)
    with next(folder.glob("*.gguf")).open("r+b") as weights:
        weights.seek(1_000_000)
        weights.write(b"damage")
    with pytest.raises(ModelNotFoundError, match="connect to the network for the first start, or give --model"):
        resolve_model(DEFAULT_MODEL)


def test_all_of_the_weights_are_read_again_only_if_they_seem_to_have_changed(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of_the_cache(model_path, tmp_path, monkeypatch)
    read: list[Path] = []

    def sha256(file: Path) -> str:
        read.append(file)
        return fetching.sha256(file)

    monkeypatch.setattr(model_source, "sha256", sha256)
    assert resolve_model(DEFAULT_MODEL) == str(folder)
    assert not read, "size and time are as they were"
    (weights,) = folder.glob("*.gguf")
    weights.touch()
    assert resolve_model(DEFAULT_MODEL) == str(folder)
    assert read == [weights], "its time has changed, its content has not"
    assert resolve_model(DEFAULT_MODEL) == str(folder)
    assert len(read) == 1, "the new time is remembered"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("{folder}/empty", "has no config.json"),
        ("{folder}", "cannot read this GGUF file"),
        ("{folder}/notes.txt", r"expected a folder or a \.gguf file"),
        ("{folder}/broken.gguf", "cannot read this GGUF file"),
    ],
)
def test_a_wrong_name_gets_a_clear_error(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(name.format(folder=tmp_path))


@pytest.mark.prove
def test_a_gguf_file_of_ones_own_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (original,) = Path(model_path).glob("*.gguf")
    mine = tmp_path / "mine.gguf"
    shutil.copy(original, mine)
    folder = Path(resolve_model(str(mine)))
    assert folder.is_relative_to(models_folder())
    assert (folder / "mine.gguf").is_symlink()
    assert (folder / "mine.gguf").samefile(mine)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert resolve_model(str(mine)) == str(folder)


NOWHERE = "/proc/nowhere"
"""Not even root can write there."""


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of_the_cache(model_path, tmp_path, monkeypatch)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock", refuse)
    assert resolve_model(DEFAULT_MODEL) == str(folder)
    (weights,) = folder.glob("*.gguf")
    weights.touch()
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", refuse)
    assert resolve_model(DEFAULT_MODEL) == str(folder), (
        "the weights are read again, though it cannot be remembered"
    )
    monkeypatch.setattr(Path, "write_text", write)
    with weights.open("ab") as file:
        file.write(b"damage")
    with pytest.raises(ModelNotFoundError, match=r"cannot be written \(Read-only file system\): set XDG"):
        resolve_model(DEFAULT_MODEL)


@pytest.mark.prove
def test_without_a_home_a_gguf_file_of_ones_own_is_described_for_this_run(
    model_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", NOWHERE)
    (original,) = Path(model_path).glob("*.gguf")
    with pytest.raises(ModelNotFoundError, match=f"cache folder {NOWHERE}.* cannot be written"):
        resolve_model(DEFAULT_MODEL)
    folder = Path(resolve_model(str(original)))
    assert (folder / "tokenizer.json").is_file()
    assert "is kept for this run alone" in caplog.text


def test_kernels_that_are_built_need_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    native.kernels()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(native, "FileLock", refuse)
    assert native.load(instruction_set()).version == native.kernels().version


def test_kernels_that_are_not_built_are_built_for_this_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = native.kernels().file
    targets: list[Path] = []

    def build(target: Path, *_: object) -> None:
        targets.append(target)
        shutil.copyfile(built, target)

    monkeypatch.setenv("XDG_CACHE_HOME", NOWHERE)
    monkeypatch.setattr(native, "build", build)
    assert native.load(instruction_set()).version == native.kernels().version
    assert not targets[0].parent.exists(), "the library is loaded, and its file is not needed any more"
    assert f"cannot write the cache folder {NOWHERE}" in caplog.text
