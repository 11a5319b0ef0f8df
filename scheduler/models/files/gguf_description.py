"""Writes what a GGUF file's metadata say as transformers has it: config, generation config and tokenizer.

python -m scheduler.models.files.gguf_description FILE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from scheduler.models.files.gguf_architectures import OWN, scale_positions, settings, special_tokens
from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.files.model_source import WARNING

LIKE = {"chatglm-bpe": "llama3", "glm4": "llama3"}
"""Ways to cut a text that have another name in transformers."""

AS_GPT_2 = {
    *("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "jina-es", "jina-de", "jina-v2-es"),
    *("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "granite-docling"),
}
"""As GPT-2 does, at most with each digit by itself: no merge of such a vocabulary has two."""


def describe(gguf: Path, folder: Path) -> None:
    """Raises what transformers does for a file that it cannot read."""
    header = GgufFile(gguf)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = config_of(header)
    cut(header)
    # A tokenizer is told by what it is, and not by its architecture, whose configuration AutoTokenizer would read.
    tokenizers: Any = PreTrainedTokenizerFast if header.architecture in OWN else AutoTokenizer
    try:
        tokenizer = tokenizers.from_pretrained(**source)
    except KeyError as error:
        raise ValueError(
            f"its tokenizer has neither merges nor {error}, without which no text can be cut into tokens: convert "
            "it again with a newer llama.cpp"
        ) from error
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
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


def config_of(header: GgufFile) -> PretrainedConfig:
    """Raises what transformers does, or `GgufError`."""
    if header.architecture in OWN:
        own: PretrainedConfig = AutoConfig.for_model(OWN[header.architecture].model_type, **settings(header))
        for name, token in special_tokens(header).items():
            setattr(own, name, token)
        return own
    config: PretrainedConfig = AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Transformers reads it for some architectures only; some models look for it that have no word for it.
    size = header.of_architecture("attention.key_length")
    if size is not None and size != head_size(config):
        config.head_dim = size
    if hasattr(config, "attention_bias") and "blk.0.attn_q.weight" in header.tensors:
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
    if hasattr(config, "mlp_bias") and "blk.0.ffn_up.weight" in header.tensors:
        config.mlp_bias = "blk.0.ffn_up.bias" in header.tensors
    scale_positions(config, header)
    return config


def cut(header: GgufFile) -> None:
    """Teach transformers more of how the authors of vocabularies cut a text before they merged bytes, and say
    where that is not known."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
    except ImportError:  # an older transformers, which has no such table
        return
    for name, like in LIKE.items():
        SPLITS.setdefault(name, SPLITS[like])
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata.get("tokenizer.ggml.model") == "gpt2" and name not in {*SPLITS, *AS_GPT_2}:
        print(
            f"{WARNING}text is cut as GPT-2 does, for how {name!r} does is not known here: its tokens may not be "
            "those that the model was trained with",
            file=sys.stderr,
        )


def head_size(config: PretrainedConfig) -> int:
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def end_tokens(header: GgufFile, known: int | list[int] | None) -> list[int] | None:
    """Of the whole text, of a turn and of a message: a file has a key for each."""
    ids = set([known] if isinstance(known, int) else known or [])
    named = (header.metadata.get(f"tokenizer.ggml.{what}_token_id") for what in ("eos", "eot", "eom"))
    return sorted(ids.union(token_id for token_id in named if token_id is not None)) or None


def main() -> int:
    try:
        describe(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
