"""Writes what transformers makes of a GGUF file's metadata: config, generation config and tokenizer.

python -m scheduler.models.files.gguf_description FILE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scheduler.models.files.gguf_file import GgufFile


def describe(gguf: Path, folder: Path) -> None:
    """Raises what transformers does for a file that it cannot read."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    header = GgufFile(gguf)
    config = AutoConfig.from_pretrained(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "head_dim") and (size := header.of_architecture("attention.key_length")) is not None:
        config.head_dim = size  # which transformers reads for some architectures only
    if hasattr(config, "attention_bias") and "blk.0.attn_q.weight" in header.tensors:
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
    if hasattr(config, "mlp_bias") and "blk.0.ffn_up.weight" in header.tensors:
        config.mlp_bias = "blk.0.ffn_up.bias" in header.tensors
    config.architectures = [getattr(model_class, "__name__", "")]  # other engines look for it
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = end_tokens(header, generation.eos_token_id)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # tokenizer.json says it all: no class of its own is needed, which would import torch into every process.
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "TokenizersBackend"}, indent=2) + "\n"
    )


def end_tokens(header: GgufFile, known: int | list[int] | None) -> list[int] | None:
    """Of the whole text, of a turn and of a message: a file has a key for each."""
    ids = set([known] if isinstance(known, int) else known or [])
    named = (header.metadata.get(f"tokenizer.ggml.{what}_token_id") for what in ("eos", "eot", "eom"))
    return sorted(ids.union(token_id for token_id in named if token_id is not None)) or None


def main() -> int:
    try:
        describe(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
