"""From the name of a model to the folder that holds its weights, config and tokenizer.

A GGUF file keeps its weights as they are. Its config and its tokenizer are written beside it once, in the forms
that transformers reads quickly, into a folder of the user's cache; a file of the user's own is linked from there.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from scheduler.models.files.fetching import NAMED_MODELS, FetchError, NamedModel, fetch, named_model, sha256
from scheduler.models.files.gguf_split import GgufError, split_files
from scheduler.models.files.hub import hub_folder

logger = logging.getLogger(__name__)

GGUF = ".gguf"

_MANIFEST = "carousel.json"
_FORM = 3
"""Of the folders written here; those of another form are written again."""


class ModelNotFoundError(ValueError):
    """The model is not where its name says, or cannot be fetched; the message says what to do."""


def resolve_model(name: str) -> str:
    """Find or fetch the model called `name`, and return the folder that it can be loaded from.

    `name` is the name of a model in `NAMED_MODELS`, a local folder, a .gguf file, or a Hugging Face id. The first
    use of a model that is not here downloads it. Two processes that start at once wait for each other. What the
    cache has is served also where it cannot be written. Raises `ModelNotFoundError`.
    """
    path = Path(name).expanduser()
    if (named := named_model(name)) is not None and not path.exists():
        return str(_named_folder(named))
    if path.is_file():
        if path.suffix.lower() != GGUF:
            raise ModelNotFoundError(f"--model {name}: expected a folder or a .gguf file")
        return str(_linked_folder(path.resolve()))
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
            raise ModelNotFoundError(
                f"--model {name}: this folder has an adapter and no model: merge it into its model first "
                "(merge_and_unload of peft)"
            )
        if not (path / "config.json").is_file():
            return str(_linked_folder(_only_gguf(path, f"--model {name}").resolve()))
        return str(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not name.lower().endswith(GGUF):
        try:
            return hub_folder(name)
        except FetchError as error:
            raise ModelNotFoundError(f"--model {error}") from error
    raise ModelNotFoundError(
        f"--model {name}: no such file or folder. Give a local folder, a .gguf file, a Hugging Face id "
        f"(owner/name), or one of {', '.join(model.name for model in NAMED_MODELS)}"
    )


def _only_gguf(folder: Path, asked: str) -> Path:
    """The GGUF file of a folder that has nothing else of a model: one, or the first of those it was split into."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() == GGUF]
    if not files:
        raise ModelNotFoundError(f"{asked}: this folder has no config.json, so it is not a model")
    try:
        if files == split_files(files[0]):
            return files[0]
    except GgufError as error:
        raise ModelNotFoundError(f"{asked}: {error}") from error
    raise ModelNotFoundError(f"{asked}: this folder has {len(files)} GGUF files: give one of them")


def models_folder() -> Path:
    """Where fetched models are kept, and what was made of GGUF files; follows XDG_CACHE_HOME."""
    return platformdirs.user_cache_path("carousel") / "models"


def _named_folder(model: NamedModel) -> Path:
    folder = models_folder() / model.name
    if _is_as_last_read(folder, model):  # nobody changes it any more, so no lock is needed, nor leave to write one
        return folder
    try:
        with _lock(folder):
            if not _is_intact(folder, model):
                partial = _new(folder)
                with tempfile.TemporaryDirectory(prefix="carousel-", dir=folder.parent) as scratch:
                    try:
                        fetch(model, partial / model.file, Path(scratch))
                    except FetchError as error:
                        shutil.rmtree(partial, ignore_errors=True)
                        raise ModelNotFoundError(str(error)) from error
                _describe(partial / model.file, partial)
                _complete(partial, folder, _stamp(partial / model.file))
    except OSError as error:
        if not _is_intact(folder, model):
            raise ModelNotFoundError(
                f"{model.name} is not in the cache, and the cache folder {folder.parent} cannot be written "
                f"({error.strerror}): set XDG_CACHE_HOME to a folder of yours, or give --model a local folder"
            ) from error
    return folder


def _linked_folder(file: Path) -> Path:
    stat = file.stat()
    version = hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = models_folder() / f"{file.stem}-{version}"
    if _manifest(folder).get("form") == _FORM:
        return folder
    try:
        with _lock(folder):
            if _manifest(folder).get("form") != _FORM:
                _link(file, folder)
    except OSError as error:
        logger.warning(
            "cannot write the cache folder %s (%s): what was read from %s is kept for this run alone; set "
            "XDG_CACHE_HOME to a folder of yours",
            folder.parent,
            error.strerror,
            file.name,
        )
        scratch = Path(tempfile.mkdtemp(prefix="carousel-models-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        folder = scratch / folder.name
        _link(file, folder)
    return folder


def _link(file: Path, folder: Path) -> None:
    """Make a folder that has a GGUF file, or all that it was split into, and what transformers makes of it."""
    partial = _new(folder)
    try:
        parts = split_files(file)
    except GgufError as error:
        raise ModelNotFoundError(str(error)) from error
    links = [partial / part.with_suffix(GGUF).name for part in parts]
    for link, part in zip(links, parts, strict=True):
        link.symlink_to(part)
    _describe(links[0], partial)
    _complete(partial, folder, {"source": str(file)})


def _lock(folder: Path) -> filelock.BaseFileLock:
    """Whoever holds it may make this folder. Raises OSError where the cache cannot be written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder.with_name(folder.name + ".lock"))


def _new(folder: Path) -> Path:
    """An empty folder that becomes `folder` when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def _complete(partial: Path, folder: Path, manifest: dict[str, Any]) -> None:
    (partial / _MANIFEST).write_text(json.dumps({"form": _FORM, **manifest}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


WARNING = "warning: "
"""Begins a line of what describes a file that whoever serves it should read."""


def _describe(gguf: Path, folder: Path) -> None:
    """Write what transformers makes of a GGUF file's metadata, in a process that ends: a large vocabulary takes
    gigabytes of memory, and much of that would stay."""
    logger.info("reading the config and the tokenizer of %s (once)", gguf.name)
    command = [sys.executable, "-m", "scheduler.models.files.gguf_description", str(gguf), str(folder)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        said = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise ModelNotFoundError(f"{gguf}: transformers cannot read this GGUF file: {said[-1]}")
    for line in result.stderr.splitlines():
        if line.startswith(WARNING):
            logger.warning("%s: %s", gguf.name, line.removeprefix(WARNING))


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_as_last_read(folder: Path, model: NamedModel) -> bool:
    """Whether a fetched model is there, and has the size and the time that it had when all of it was read."""
    manifest = _manifest(folder)
    try:
        return manifest.get("form") == _FORM and {**manifest, **_stamp(folder / model.file)} == manifest
    except OSError:
        return False


def _is_intact(folder: Path, model: NamedModel) -> bool:
    """Whether a fetched model is there, whole and unchanged. Reading all of it takes seconds: that is done only if
    its size or its time is another than when it was last read."""
    if _is_as_last_read(folder, model):
        return True
    manifest, file = _manifest(folder), folder / model.file
    if manifest.get("form") != _FORM:
        return False
    try:
        intact = sha256(file) == model.sha256
        stamp = _stamp(file)
    except OSError:
        intact = False
    if not intact:
        logger.warning("%s is damaged: it is made again", folder)
        return False
    with contextlib.suppress(OSError):  # a cache that cannot be written: it is read again next time
        (folder / _MANIFEST).write_text(json.dumps({**manifest, **stamp}, indent=2) + "\n")
    return True


def _stamp(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
