"""Which GGUF files are served exactly: tiny files of each architecture and of each type of blocks.

python -m benchmarks.families.gguf_files [--write docs/models.md]

A file has the weights of a tiny model with random weights, and lies beside that model's configuration, or where a
mapping of our own reads it, beside what that makes of its header. What it is served with is float32, so that
greedy tokens have to be those of transformers' own forward pass with the same weights. An architecture that
neither has a configuration for is refused before that.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

from benchmarks.families.check import Found, answers, difference, expected_tokens, path_of
from benchmarks.families.gguf_writer import write_gguf
from benchmarks.families.tiny import tiny_model
from scheduler.config import EngineConfig
from scheduler.models.files.checkpoint import STORED_TYPES
from scheduler.models.files.gguf_architectures import OWN
from scheduler.models.files.gguf_description import config_of
from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.model_config import UnsupportedModelError
from scheduler.process.engine_core import EngineCore

TITLE = "## GGUF files"

TYPES = {
    **{name: name for name in ("falcon", "gemma", "gemma2", "llama", "nemotron", "phi3", "qwen2", "qwen3")},
    **{name: name for name in ("stablelm", "starcoder2")},
    **{name: own.model_type for name, own in OWN.items()},
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
}
"""Of transformers, by the names of architectures whose weights a converter leaves as they are, but for the order
of some rows and for norms."""

PROMPTS = [[3 + (5 * place + number) % 150 for place in range(3 + 20 * number)] for number in range(4)]

LARGEST, TRIES = 0.5, 100
"""Of a weight in random blocks; how often as many are drawn as would do."""


def architectures() -> Iterator[Found]:
    """What became of each that the gguf package knows."""
    for name in tqdm(sorted(set(gguf.MODEL_ARCH_NAMES.values())), desc="architectures", unit="file"):
        if name not in OWN and (refusal := _refusal(name)) is not None:
            yield Found(name, "refused", detail=refusal)
        elif name not in TYPES:
            yield Found(name, "not built", detail="transformers reads it; no file of it was made here")
        else:
            yield _served(name, {"": "F32"}, TYPES[name])


def _refusal(architecture: str) -> str | None:
    """What transformers says of a file of this architecture that has no more than a header."""
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "model.gguf", architecture)
        writer.add_block_count(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        try:
            AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
        except Exception as error:
            said = " ".join(str(error).split())
            return said if "not supported" in said else None
    return None


def kinds() -> Iterator[Found]:
    """What became of each type of blocks, in a Llama."""
    for kind in tqdm(list(GGMLQuantizationType), desc="types", unit="file"):
        name = kind.name
        if name.startswith(("I8", "I16", "I32", "I64", "F64")):
            continue
        yield _served(name, {"": name}, "llama")


def _served(name: str, stored_as: dict[str, str], model_type: str) -> Found:
    try:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64} if stored_as[""] != "F32" else {}
        # Of its layers without positions a file says nothing.
        model = tiny_model(model_type, **sizes, **({"no_rope_layers": [1, 1, 1, 0]} if name == "smollm3" else {}))
    except Exception as error:
        return Found(name, "not built", detail=f"{type(error).__name__}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            blocks = _blocks(model, stored_as[""])
            write_gguf(model, Path(folder) / "model.gguf", stored_as, blocks=blocks)
            header = GgufFile(Path(folder) / "model.gguf")
            (config_of(header) if name in OWN else model.config).save_pretrained(folder)
            expected = [expected_tokens(model, prompt) for prompt in PROMPTS]
        except Exception as error:
            return Found(name, "not built", detail=f"{type(error).__name__}: {error}")
        try:
            config = EngineConfig(dtype="float32", quantization="none", kv_cache_memory="64MB", max_num_seqs=4)
            core = EngineCore(config, folder)
            found = answers(core, PROMPTS)
        except UnsupportedModelError as error:
            return Found(name, "refused", detail=str(error))
        for tokens, steps in zip(found, expected, strict=True):
            if wrong := difference(tokens, steps):
                return Found(name, "wrong", path_of(core), wrong)
        return Found(name, "exact", path_of(core))


def _blocks(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """Random blocks for each matrix, by its name, which the model is given too; none for types of floats."""
    number = GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[number]
    if size == 1:
        for weight in model.parameters() if kind != "F32" else ():
            if weight.dim() == 2:
                weight.data = weight.data.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
        return {}
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, weight in model.state_dict().items():
            if weight.dim() == 2:
                found[name], values = _random_blocks(rng, weight.shape[0], weight.shape[1] // size, width, number)
                weight.copy_(torch.from_numpy(values))
    return found


def _random_blocks(
    rng: np.random.Generator, rows: int, columns: int, width: int, kind: GGMLQuantizationType
) -> tuple[Any, Any]:
    """[rows, columns * width] bytes of blocks whose numbers are small, and these numbers."""
    kept: list[Any] = []
    for _ in range(TRIES):
        if sum(map(len, kept)) >= rows * columns:
            break
        tried = rng.integers(0, 256, (4 * rows * columns, width), dtype=np.uint8)
        values = np.abs(gguf.quants.dequantize(tried, kind)).max(axis=1)
        kept.append(tried[(values > 0.01) & (values < LARGEST)])
    else:
        raise ValueError("random blocks of it have no small numbers")
    data = np.concatenate(kept)[: rows * columns].reshape(rows, columns * width)
    return data, gguf.quants.dequantize(data, kind)


def page(files: list[Found], types: list[Found]) -> str:
    """In Markdown."""
    head = f"""{TITLE}

Made by `python -m benchmarks.families.gguf_files --write docs/models.md`: tiny files, served in float32 beside
transformers' forward pass with the same weights. Of a file's header (configuration, tokenizer) transformers'
reading is taken, {transformers.__version__} here; {", ".join(sorted(OWN))} have a mapping of our own
(`scheduler/models/files/gguf_architectures.py`). Positions that are scaled (linear, yarn) are read whatever the
architecture.

| architecture | served | how |
| --- | --- | --- |
"""
    refused = [each.model_type for each in files if each.verdict == "refused" and "not supported" in each.detail]
    rows = [_row(each) for each in files if each.model_type not in refused]
    rest = f"\nRefused, since nobody reads such a file here: {', '.join(refused)}.\n"
    middle = "\n| type of blocks | served | how |\n| --- | --- | --- |\n"
    return head + "".join(rows) + rest + middle + "".join(_row(each, is_kind=True) for each in types)


def _row(each: Found, *, is_kind: bool = False) -> str:
    how = each.path if each.verdict == "exact" else each.detail.replace("|", "/").split(". ")[0][:160]
    if is_kind and each.verdict == "exact" and each.model_type not in ("F32", "F16", "BF16"):
        how = "multiplied as it is" if each.model_type in STORED_TYPES else "made float32 when it is read"
    return f"| {each.model_type} | {each.verdict} | {how} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="replace the part on GGUF files of this page")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    files, types = list(architectures()), list(kinds())
    for each in (*files, *types):
        print(f"{each.model_type:24} {each.verdict:9} {each.path:24} {each.detail[:160]}")
    if args.write is not None:
        before = args.write.read_text().partition(TITLE)[0].rstrip()
        args.write.write_text(f"{before}\n\n{page(files, types)}")
    return int(any(each.verdict in ("wrong", "crashed") for each in (*files, *types)))


if __name__ == "__main__":
    sys.exit(main())
