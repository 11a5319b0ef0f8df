"""What arithmetic in fewer bits costs: perplexity, and how far the next token's distribution moves.

`--quantization auto` measures it once for each model, on this processor's instructions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
import torch
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm

from scheduler.attention import AttentionBackend
from scheduler.execution.kv_cache import KVCache
from scheduler.execution.step_model import StepModel
from scheduler.kernels.native import kernels
from scheduler.models.plain_batch import plain_batch
from scheduler.models.products import Mode
from scheduler.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
"""The first chapter of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), in the public domain."""

MAX_COST = 0.01
"""`--quantization auto` takes an arithmetic if it raises perplexity by less than this share."""

CANDIDATES: tuple[Mode, ...] = ("int4", "int8")
"""What it tries, the fastest first."""

CONTEXT = 512
"""Tokens in one window of the text; each is predicted from those before it in its window."""

BLOCK_SIZE = 16

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
        for first in range(0, len(token_ids), CONTEXT):
            window = token_ids[first : first + CONTEXT]
            for start in range(0, len(window) - 1, CHUNK):
                chunk = window[start : min(start + CHUNK, len(window) - 1)]
                batch = plain_batch({0: chunk}, start, width=CONTEXT // BLOCK_SIZE, block_size=BLOCK_SIZE)
                logits = self._model.forward(batch, self._cache).logits
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
    memory = _memory(model_path)
    known = _read(memory)

    def measured(mode: Mode) -> float:
        if mode not in known:
            logger.info("measuring the perplexity of this model with %s products (once)", mode)
            known[mode] = measure(mode)
            _write(memory, known)
        return known[mode]

    for mode in CANDIDATES:
        cost = measured(mode) / measured(plain) - 1.0
        verdict = "takes" if cost < MAX_COST else "leaves alone"
        logger.info(
            "--quantization auto %s %s: perplexity %.3f, %+.2f %% against %.3f",
            verdict,
            mode,
            known[mode],
            100 * cost,
            known[plain],
        )
        if cost < MAX_COST:
            return mode
    return plain


def _memory(model_path: str) -> Path:
    """One small file in the user's cache for each model and version of it, and for each build of the kernels."""
    digest = hashlib.sha256(f"{model_path}\0{kernels().__name__}\0{_version(model_path)}".encode())
    return platformdirs.user_cache_path("carousel") / "quantization" / f"{digest.hexdigest()[:16]}.json"


def _version(model_path: str) -> str:
    """What changes when the model does: of a folder its files' sizes and times, of a Hugging Face id the commit in
    the cache, from which the model has just been read."""
    if (folder := Path(model_path)).is_dir():
        stats = [(file.name, file.stat()) for file in sorted(folder.glob("*"))]
        return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    config = try_to_load_from_cache(model_path, "config.json")
    return Path(config).parent.name if isinstance(config, str) else ""


def _read(memory: Path) -> dict[Mode, float]:
    try:
        known = json.loads(memory.read_text())
        return {mode: float(value) for mode, value in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(memory: Path, known: dict[Mode, float]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(known) + "\n")
    except OSError as error:
        logger.warning("cannot remember perplexities in %s (%s): they are measured at each start", memory, error)


def text_tokens(model_path: str) -> list[int]:
    return Tokenizer(model_path).encode(TEXT.read_text())
