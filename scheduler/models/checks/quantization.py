"""What arithmetic in fewer bits costs: perplexity, and how far the next token's distribution moves.

`--quantization auto` measures it once for each model, on this processor's instructions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from scheduler.attention import AttentionBackend
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepModel
from scheduler.kernels.native import kernels
from scheduler.models.modules.plain_batch import BLOCK_SIZE, plain_batch
from scheduler.models.products import Mode
from scheduler.models.remembered import Facts, model_version, remembered
from scheduler.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT = Path(__file__).parents[2] / "data" / "alice.txt"
"""The first chapter of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), in the public domain."""

MAX_COST = 0.01
"""`--quantization auto` takes an arithmetic if it raises perplexity by less than this share."""

CANDIDATES: tuple[Mode, ...] = ("int4", "int8")
"""What it tries, the fastest first."""

CONTEXT = 512
"""Tokens in one window of the text; each is predicted from those before it in its window."""

CHUNK = 128
"""Tokens whose logits are held at once: a vocabulary of 150,000 makes 80 MB of them."""


class TextLogprobs:
    """Log-probabilities of the next token after each token of a text but its windows' last, chunk by chunk."""

    def __init__(self, model: StepModel, backend: AttentionBackend, dtype: torch.dtype) -> None:
        self._model = model
        self._cache = KVCache(
            model.layers,
            backend,
            num_blocks=CONTEXT // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=torch.device("cpu"),
        )

    def chunks(self, token_ids: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Float32 log-probabilities [tokens, vocabulary], and the tokens that came next [tokens]."""
        self._model.bind(self._cache, CONTEXT)
        for first in range(0, len(token_ids), CONTEXT):
            window = token_ids[first : first + CONTEXT]
            for start in range(0, len(window) - 1, CHUNK):
                chunk = window[start : min(start + CHUNK, len(window) - 1)]
                batch = plain_batch({0: chunk}, start, width=CONTEXT // BLOCK_SIZE, block_size=BLOCK_SIZE)
                logits = self._model.forward(batch).logits
                following = torch.tensor(window[start + 1 : start + 1 + len(chunk)])
                yield torch.log_softmax(logits.float(), dim=-1), following


def perplexity(model: StepModel, backend: AttentionBackend, token_ids: list[int], dtype: torch.dtype) -> float:
    """The exponential of the mean negative log-likelihood of `token_ids`, in windows of `CONTEXT` tokens, with
    keys and values of `dtype`."""
    loss, count = 0.0, 0
    chunks = TextLogprobs(model, backend, dtype).chunks(token_ids)
    for logprobs, following in tqdm(chunks, desc="measuring perplexity", unit="chunk", delay=2):
        loss -= logprobs.gather(1, following.unsqueeze(1)).sum().item()
        count += len(following)
    return math.exp(loss / count)


def kl_divergence(reference: TextLogprobs, other: TextLogprobs, token_ids: list[int]) -> float:
    """The mean over `token_ids` of KL(reference || other) of the next token's distribution, in nats. Both models
    run side by side, so that a chunk's logits is all that is kept of either."""
    total, count = 0.0, 0
    chunks = zip(reference.chunks(token_ids), other.chunks(token_ids), strict=True)
    for (theirs, _), (ours, _) in tqdm(chunks, desc="measuring divergence", unit="chunk", delay=2):
        total += torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        count += len(ours)
    return total / count


def choose_mode(model_path: str, plain: Mode, measure: Callable[[Mode], float]) -> Mode:
    """The first of `CANDIDATES` that costs less than `MAX_COST`, or else `plain`; perplexities that were measured
    before, on this version of the model and of the kernels, are remembered."""
    version = model_version(model_path)

    def measured(mode: Mode) -> float:
        def find() -> Facts:
            logger.info("measuring the perplexity of this model with %s products (once)", mode)
            return {"perplexity": measure(mode)}

        facts = (model_path, version, kernels().version, mode)
        return float(remembered("quantization", facts, find)["perplexity"])

    for mode in CANDIDATES:
        ours, theirs = measured(mode), measured(plain)
        cost = ours / theirs - 1.0
        verdict = "takes" if cost < MAX_COST else "leaves alone"
        logger.info(
            "--quantization auto %s %s: perplexity %.3f, %+.2f %% against %.3f",
            verdict,
            mode,
            ours,
            100 * cost,
            theirs,
        )
        if cost < MAX_COST:
            return mode
    return plain


def text_tokens(model_path: str) -> list[int]:
    return Tokenizer(model_path).encode(TEXT.read_text())
