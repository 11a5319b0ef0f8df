"""Whether int8 products are worth it: measured once for each model, by what they cost in perplexity."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import platformdirs
import torch
from tqdm import tqdm

from scheduler.attention import AttentionBackend, LayerSpec, PackedBatch
from scheduler.kv_cache import KVCache
from scheduler.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT = Path(__file__).parent / "data" / "alice.txt"
"""The first chapter of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), in the public domain."""

MAX_COST = 0.01
"""`--quantization auto` takes int8 if it raises perplexity by less than this share."""

CONTEXT = 512
"""Tokens in one window of the text; each is predicted from those before it in its window."""


class StepModel(Protocol):
    """What runs a packed batch: PagedModel, or FusedModel."""

    layers: list[LayerSpec]

    def forward(self, batch: PackedBatch, cache: KVCache) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Cost:
    """Perplexity of a model on `TEXT`, with int8 products and without."""

    int8: float
    unquantized: float

    @property
    def share(self) -> float:
        """By how much int8 raises it: 0.01 is one per cent."""
        return self.int8 / self.unquantized - 1.0

    def __str__(self) -> str:
        return f"perplexity {self.int8:.3f}, {self.share:+.2%} against {self.unquantized:.3f} without"


def perplexity(model: StepModel, backend: AttentionBackend, token_ids: list[int], dtype: torch.dtype) -> float:
    """The exponential of the mean negative log-likelihood of `token_ids`, in windows of `CONTEXT` tokens."""
    num_blocks = CONTEXT // 16
    cache = KVCache(
        model.layers, backend, num_blocks=num_blocks, block_size=16, dtype=dtype, device=torch.device("cpu")
    )
    loss, count = 0.0, 0
    windows = [token_ids[start : start + CONTEXT] for start in range(0, len(token_ids), CONTEXT)]
    for window in tqdm(windows, desc="measuring perplexity", unit="window", delay=2):
        rows = torch.arange(len(window))
        batch = PackedBatch(
            input_ids=torch.tensor(window),
            positions=rows,
            slot_mapping=rows,
            query_start=torch.tensor([0, len(window)], dtype=torch.int32),
            context_lens=torch.tensor([len(window)], dtype=torch.int32),
            block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
            sample_rows=rows,
            query_lens=[len(window)],
            contexts=[len(window)],
        )
        logprobs = torch.log_softmax(model.forward(batch, cache)[:-1].float(), dim=-1)
        loss -= logprobs.gather(1, torch.tensor(window[1:]).unsqueeze(1)).sum().item()
        count += len(window) - 1
    return math.exp(loss / count)


def remembered_cost(model_path: str) -> Cost | None:
    """What `remember_cost` kept for this model, unless its files have changed since."""
    try:
        return Cost(**json.loads(_memory(model_path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def remember_cost(model_path: str, cost: Cost) -> None:
    file = _memory(model_path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(cost)) + "\n")
    except OSError as error:
        logger.warning("cannot remember the cost of int8 in %s (%s): it is measured at each start", file, error)


def _memory(model_path: str) -> Path:
    """One small file in the user's cache for each model and version of it."""
    digest = hashlib.sha256(model_path.encode())
    for file in sorted(Path(model_path).glob("*")) if Path(model_path).is_dir() else []:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return platformdirs.user_cache_path("carousel") / "quantization" / f"{digest.hexdigest()[:16]}.json"


def text_tokens(model_path: str) -> list[int]:
    return Tokenizer(model_path).encode(TEXT.read_text())
