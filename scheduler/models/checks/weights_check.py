"""Whether packed weights give what the checkpoint says: two short sequences, through transformers' modules and
through what is served.

The small copies of probe.py say that a way to run a model is right. This says that these weights are where they
belong, at their real widths, and that the products of this processor can be believed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from scheduler.kernels.native import kernels
from scheduler.models.files.checkpoint import Checkpoint, StoredBlocks, Weight
from scheduler.models.fused.fused_weights import EMBEDDING, HEAD
from scheduler.models.modules.paged_model import PagedModel
from scheduler.models.products import Mode

VERSION = 1
"""Of what is remembered."""

NUM_SEQUENCES, LENGTH = 2, 24
"""The latter in tokens."""

CUT = 17
"""Where they are cut into two chunks."""

TOLERANCE: dict[Mode, float] = {"f32": 1e-3, "bf16": 0.1, "stored": 0.3, "int8": 0.5, "int4": 0.9}
"""That rounding may make of a difference, as `typical_difference` has it: several times what it makes of those of
SmolLM2-135M and Qwen2.5-Coder-0.5B. Logits that have nothing to do with each other differ by 1.4."""


def tried_tokens(vocab_size: int) -> list[int]:
    """Token ids from the whole vocabulary, in no order."""
    count = min(NUM_SEQUENCES * LENGTH, vocab_size)
    ids = torch.linspace(0, vocab_size - 1, count, dtype=torch.float64).long()
    return ids[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()


def in_sequences(ids: Sequence[int]) -> list[list[int]]:
    """These tokens, in sequences of `LENGTH`: the first again where there are too few."""
    return [
        [ids[(number * LENGTH + place) % len(ids)] for place in range(LENGTH)] for number in range(NUM_SEQUENCES)
    ]


def typical_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The median over all tokens of how far two models' logits [T, vocabulary] are apart, as a part of how far
    theirs are from their mean. One token whose expert is another one by a hair does not count."""
    expected = torch.cat(list(theirs))
    distance = (torch.cat(list(ours)) - expected).norm(dim=1)
    size = (expected - expected.mean(dim=1, keepdim=True)).norm(dim=1)
    return float((distance / size).median())


@torch.inference_mode()
def logits_of_modules(
    config: PretrainedConfig, outline: PagedModel, checkpoint: Checkpoint, ids: Sequence[int]
) -> list[Tensor]:
    """What transformers' modules of a fused family make of `in_sequences(ids)`, in float32 and with one weight in
    memory at a time: the logits of the tokens `ids` alone, [T, ids] for each."""
    # Both take part of a second to import, and a model is checked once.
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    narrow = copy.deepcopy(config)
    narrow.vocab_size = len(ids)
    narrow.pad_token_id = None  # it may be beyond the vocabulary
    with init_empty_weights(include_buffers=False):
        module: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            narrow, dtype=torch.float32, attn_implementation="eager"
        )
    module.eval()
    module.model.rotary_emb = outline.module.base_model.rotary_emb  # a GGUF file may have changed its frequencies
    with tqdm(total=len(module.state_dict()), desc="checking the weights", unit="weight", delay=2) as progress:
        weights = _Floats(checkpoint, ids, config.tie_word_embeddings, progress.update)
        attach_align_device_hook(module, torch.device("cpu"), offload=True, weights_map=weights)
        inputs = torch.tensor(in_sequences(range(len(ids))))
        logits: Tensor = module(input_ids=inputs, use_cache=False).logits
    return list(logits)


class _Floats:
    """A checkpoint's weights in float32; of the vocabulary, the rows of some tokens."""

    def __init__(
        self, checkpoint: Checkpoint, ids: Sequence[int], is_tied: bool, was_read: Callable[[], object]
    ) -> None:
        self._checkpoint = checkpoint
        self._ids = list(ids)
        self._is_tied = is_tied
        self._was_read = was_read

    def __getitem__(self, name: str) -> Tensor:
        self._was_read()
        if name == HEAD and self._is_tied:
            name = EMBEDDING
        if name in (HEAD, EMBEDDING):
            return _floats(_rows(self._checkpoint.table(name), self._ids))
        return _floats(self._checkpoint.weight(name))


def _rows(weight: Weight, rows: list[int]) -> Weight:
    if isinstance(weight, StoredBlocks):
        return StoredBlocks(weight.data[rows], weight.type)
    return weight[rows]


def _floats(weight: Weight) -> Tensor:
    if isinstance(weight, StoredBlocks):
        values: Tensor = kernels().StoredMatrix(weight.data, weight.type).dequantize()
        return values
    return weight.float()
