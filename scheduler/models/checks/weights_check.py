"""Whether packed weights give what the checkpoint says: each layer of a fused family beside transformers' modules,
whose weights are read a second time (reference.py).

The small copies of probe.py say that a way to run a model is right. This says that these weights are where they
belong, at their real widths, and that the products of this processor can be believed. A layer is given what the
reference gave it, so that what is wrong with one is not lost in what rounding makes of all before it; in float32
first, where rounding is next to nothing, so that a fault of the reader shows however coarse the products are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from scheduler.attention import AttentionBackend, LayerSpec
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepOutput
from scheduler.kernels.native import kernels
from scheduler.models.checks.reference import LENGTH, NUM_SEQUENCES, Reference
from scheduler.models.checks.second_reader import SecondReader
from scheduler.models.files.checkpoint import NamedWeights
from scheduler.models.fused.fused_model import make_decoder
from scheduler.models.fused.fused_weights import DecoderLayer, DecoderWeights
from scheduler.models.fused.outline import Outline
from scheduler.models.modules.plain_batch import BLOCK_SIZE, plain_batch
from scheduler.models.products import Mode

VERSION = 2
"""Of what is remembered."""

CUT = 17
"""Where sequences are cut into two chunks."""

TOLERANCE: dict[Mode, float] = {"f32": 1e-3, "bf16": 0.1, "stored": 0.3, "int8": 0.5, "int4": 0.9}
"""That rounding may make of a difference, as `typical_difference` has it: several times what it makes of those of
SmolLM2-135M and Qwen2.5-Coder-0.5B. Vectors that have nothing to do with each other differ by 1.4."""


def typical_difference(ours: Tensor, theirs: Tensor, origin: Tensor) -> float:
    """The median over all tokens of how far our vector is from theirs, [tokens, size], as a part of how far that
    is from `origin`. One token whose expert is another one by a hair does not count."""
    return float(((ours - theirs).norm(dim=1) / (theirs - origin).norm(dim=1)).median())


def difference_of_logits(ours: Tensor, theirs: Tensor) -> float:
    """`typical_difference` of logits [tokens, vocabulary], from their mean."""
    return typical_difference(ours, theirs, theirs.mean(dim=1, keepdim=True))


def reading_fault(first: NamedWeights, second: SecondReader) -> str | None:
    """What is wrong with how a checkpoint is read, if anything is: two readers differ."""
    if left := second.names.symmetric_difference(first.names):
        return f"{min(left)} is read in one way and not in another"
    for name in tqdm(first.names, desc="checking the weights", unit="weight", delay=2):
        ours, theirs = first.weight(name).float(), second.floats(name)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
            return f"{name} is not what its file says: it was read in two ways, which give different numbers"
    return None


@torch.inference_mode()
def fused_fault(
    config: PretrainedConfig,
    outline: Outline,
    weights: DecoderWeights,
    reference: Reference,
    *,
    mode: Mode,
    exact: Callable[[int], DecoderLayer],
    backend: AttentionBackend,
    num_threads: int,
) -> str | None:
    """What is wrong with weights that are packed for products in `mode`, if anything is. `exact` packs a layer for
    products in float32."""
    width = config.hidden_size
    scale = width**0.5 if config.model_type.startswith("gemma") else 1.0
    ropes = outline.tables(reference.positions[-1] + 1)
    none = kernels().pack([torch.zeros(16, width)], None, "f32")
    rows = list(range(NUM_SEQUENCES * LENGTH))

    def normed(states: Tensor) -> Tensor:
        epsilon: float = config.rms_norm_eps
        return states * (states.square().mean(dim=1, keepdim=True) + epsilon).rsqrt()

    def given(number: int, layer: DecoderLayer) -> DecoderWeights:
        """This layer alone, which is given what the reference gave it, and no more than a norm after it."""
        states = (reference.entered[number] / scale).contiguous()
        return replace(weights, embedding=states, layers=[layer], head=none, final_norm=torch.ones(width))

    def run(part: DecoderWeights, number: int, ids: list[int]) -> StepOutput:
        decoder = make_decoder(config, outline, part, ropes, first=number)
        return _run(decoder, outline.layers[number], ids, reference.positions, backend, num_threads)

    def said(what: str, found: float, products: Mode) -> str | None:
        if found <= TOLERANCE[products]:
            return None
        return (
            f"{what} differs by {found:.3g} from what transformers' modules make of the file, where at most "
            f"{TOLERANCE[products]:g} is rounding"
        )

    for number, layer in enumerate(weights.layers):
        before, after = map(normed, reference.entered[number : number + 2])
        states = run(given(number, exact(number)), number, rows).states
        if fault := said(f"layer {number}", typical_difference(states, after, before), "f32"):
            return fault
        states = run(given(number, layer), number, rows).states
        if fault := said(
            f"layer {number}, packed for {mode} products,", typical_difference(states, after, before), mode
        ):
            return fault
    before, after = map(normed, reference.entered[:2])
    first = replace(given(0, exact(0)), embedding=weights.embedding)
    states = run(first, 0, reference.ids).states
    if fault := said("the embedding", typical_difference(states, after, before), "bf16"):
        return fault
    last = len(weights.layers) - 1
    final = replace(given(last, weights.layers[last]), head=weights.head, final_norm=weights.final_norm)
    logits = run(final, last, rows).logits[:, reference.ids]
    return said("the last layer with the logits", difference_of_logits(logits, reference.logits), mode)


def _run(
    decoder: Any,
    spec: LayerSpec,
    ids: Sequence[int],
    positions: Sequence[int],
    backend: AttentionBackend,
    num_threads: int,
) -> StepOutput:
    """The states and the logits of all tokens of `NUM_SEQUENCES` sequences, in two chunks."""
    width = -(-LENGTH // BLOCK_SIZE)
    cache = KVCache(
        [spec],
        backend,
        num_blocks=NUM_SEQUENCES * width,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    keys, values, groups = zip(*cache.layers, strict=True)
    decoder.bind_cache(list(keys), list(values), list(groups))
    parts: list[tuple[Tensor, Tensor]] = []
    for begin, end in itertools.pairwise((0, CUT, LENGTH)):
        texts = {text: ids[text * LENGTH + begin : text * LENGTH + end] for text in range(NUM_SEQUENCES)}
        batch = plain_batch(texts, begin, width=width, block_size=BLOCK_SIZE)
        parts.append(
            decoder.forward(
                batch.input_ids.int(),
                torch.tensor(positions[begin:end]).repeat(NUM_SEQUENCES),
                batch.block_tables,
                batch.query_start,
                batch.context_lens,
                batch.sample_rows.int(),
                batch.sample_rows.int(),
                num_threads,
            )
        )
    whole = (
        torch.cat([each.unflatten(0, (NUM_SEQUENCES, -1)) for each in kind], dim=1)
        for kind in zip(*parts, strict=True)
    )
    logits, states = (each.flatten(0, 1) for each in whole)
    return StepOutput(logits, states)
