"""The page of what is served, made from what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from benchmarks.families.check import Found

HEAD = """# Which models are served, and how

Made by `python -m benchmarks.families --write docs/models.md`, which builds a tiny model with random weights of
each of transformers' causal model types, and asks it alone, with others, in chunks of 16 tokens, with a prefix
that was computed before, and with a preemption in the middle of its answer. **Exact** means that each time the
greedy tokens were those of transformers' own forward pass without any cache, in float32. transformers
{transformers}, torch {torch}.

- **native decoder**: the whole forward pass in one native call. A request has the same bits whoever else is in
  the batch; quantization, speculation and context shift are for these families.
- **together**: transformers' modules on one packed batch, with keys and values in the block pool; linear layers
  and experts are native products, and a router's rows are sorted by expert. Attention is native, with windows,
  chunks, sinks and ALiBi, where its heads have a size that the kernel takes, and else torch's. Latent attention
  (DeepSeek, GLM, MiniCPM) keeps one latent a token in the pool, not the keys and values of all heads.
- **together, with states**: the same; layers that keep a state for each sequence (convolutions, linear attention,
  state spaces) are transformers', take sequences that decode all together, and chunks of prompts one by one;
  those of Mamba's first version take a chunk that has some tokens before it token by token.
  States are kept by seat, and put aside where a prompt's last block ends, where prompts part, and behind the last
  full block of an answer: from there others share the prefix, and a sequence goes on after a preemption.
- **one by one**: transformers' modules on each sequence by itself, with the model's own cache. For models that
  attend or keep states in a way of their own (an index, two caches). Nothing is shared between requests,
  and a step takes as long as all its sequences together.

`python -m benchmarks.modules` prints what a step takes with 1, 8 and 32 sequences, beside transformers' modules.

Which way a model is run is found out when it is loaded, with a small copy of its configuration, and remembered.
What is exact in no way is refused, in a sentence. Models that also read images or sound are served with text.

Where positions are others for a long text (longrope: Phi-3 and later), a sequence that comes to be longer than
the original length is computed anew with the long factors, and what was cached of short texts is not taken for it:
each token is that of a fresh forward pass over all before it, whoever else is in the batch. Where they change with
each token more (dynamic NTK), sequences end at the original length, and the log says so.

Weights are read from safetensors (float32, bfloat16, float16; or quantized by GPTQ in 4 and 8 bits, AWQ,
compressed-tensors in 4 and 8 bits, in blocks of float8 and as NVFP4, FP8, MXFP4 or bitsandbytes in 4 and 8 bits,
which are made floats again and then rounded as `--quantization` says) and from GGUF, also from files that were
split. Tokenizers are read from `tokenizer.json`, from a `tokenizer.model` alone, and from GGUF; where it is not
known how the authors of a GGUF file's vocabulary cut a text, the log says so.

Nothing of this is taken on trust. When a checkpoint is first loaded, its weights are read a second time by code
that shares nothing with the first, and each layer of what the native decoder will run is held against
transformers' modules with those weights, on two short texts of which a part lies far into a context: in
float32, where rounding is next to nothing, and as it will be served. Quantized weights that go to transformers'
modules are compared number by number. A tensor that the model does not take, or lacks, or that has another
shape than the config says is a refusal, in GGUF files too, which transformers would read without a word.
`tests/scheduler/test_faults_put_in.py` puts some 60 kinds of faults into the loader: each is found.

{counts}.

| type | served | how |
| --- | --- | --- |
"""


def page(found: Sequence[Found]) -> str:
    """In Markdown."""
    counts = Counter(each.verdict for each in found)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    rows = [f"| {each.model_type} | {each.verdict} | {_how(each)} |\n" for each in sorted(found, key=_name)]
    head = HEAD.format(
        counts=f"Of {len(found)} types: {said}", torch=torch.__version__, transformers=transformers.__version__
    )
    return head + "".join(rows)


def _how(each: Found) -> str:
    return each.path if each.verdict == "exact" else each.detail.replace("|", "/").split(". ")[0][:200]


def _name(each: Found) -> str:
    return each.model_type
