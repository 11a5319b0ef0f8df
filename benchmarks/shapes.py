"""A checkpoint of random weights in the shape of Llama-3.2-1B, to measure larger models by.

    python -m benchmarks.shapes

It has SmolLM2's tokenizer, with the vocabulary padded to Llama's 128,256: safetensors, and the same as GGUF (BF16,
and Q4_0 by llama.cpp's own tool). It can say nothing, but it takes as long over it as the real one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128256, 2048, 8192, 16, 32, 8, 64
CONTEXT, ROPE_THETA, NORM_EPS = 8192, 500000.0, 1e-5

_UNUSED_TOKEN = 5
"""llama.cpp's word for a token that no text has."""


def make(folder: Path, tokenizer: Path) -> None:
    """Write the checkpoint, with the tokenizer of another one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    theirs = AutoTokenizer.from_pretrained(str(tokenizer))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=True,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():  # an answer is made of tokens that have a text
        model.model.embed_tokens.weight[len(theirs) :] *= 0.01
    model.save_pretrained(folder)
    theirs.save_pretrained(folder)


def write_gguf(folder: Path, tokenizer: Path, file: Path) -> None:
    """Write the checkpoint as GGUF in BF16, with the tokenizer of another GGUF file, padded."""
    import gguf
    from safetensors.torch import load_file
    from tqdm import tqdm

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("random weights in the shape of Llama-3.2-1B")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _copy_tokenizer(gguf.GGUFReader(tokenizer), writer)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tqdm(tensors.items(), desc="writing GGUF", unit="tensor"):
        values = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleaved(values, HEADS if "q_proj" in name else KV_HEADS)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


def _interleaved(weight: Any, heads: int) -> Any:
    """GGUF turns neighbouring pairs of a head's channels, where safetensors turn its two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _copy_tokenizer(source: Any, writer: Any) -> None:
    fields = {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in source.fields.items()
        if name.startswith("tokenizer.")
    }
    tokens, types = list(fields["tokens"]), list(fields["token_type"])
    padding = range(len(tokens), VOCABULARY)
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(tokens + [f"<|padding {number}|>" for number in padding])
    writer.add_token_types(types + [_UNUSED_TOKEN for _ in padding])
    writer.add_token_merges(list(fields["merges"]))
    writer.add_bos_token_id(int(fields["bos_token_id"]))
    writer.add_eos_token_id(int(fields["eos_token_id"]))
    writer.add_add_bos_token(False)
    if (template := fields.get("tokenizer.chat_template")) is not None:
        writer.add_chat_template(template)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="make it again where it was made before")
    args = parser.parse_args()
    from benchmarks.peers.installing import PeerError
    from benchmarks.peers.models import MODELS

    model = MODELS["llama-1b"]
    if args.again:
        shutil.rmtree(model.folder, ignore_errors=True)
    try:
        for made in (model.safetensors(), model.published(), model.q4_0()):
            print(f"{made}: {model.bits(made):.2f} bits a weight")
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
