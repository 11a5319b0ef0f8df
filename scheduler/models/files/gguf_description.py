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
    config.architectures = [getattr(model_class, "__name__", "")]  # other engines look for it
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # tokenizer.json says it all: no class of its own is needed, which would import torch into every process.
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "TokenizersBackend"}, indent=2) + "\n"
    )


def main() -> int:
    try:
        describe(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
