"""The draft model: a small one of the same vocabulary, which guesses what the large one will say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scheduler.config import EngineConfig
from scheduler.execution.kv_cache import KVCache, LayerGroup, bytes_per_block
from scheduler.execution.step_model import StepModel
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.opening import OpenedModel, open_model
from scheduler.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft model that is ready to run."""

    model: StepModel
    cache: KVCache
    vocab_size: int


@dataclass(frozen=True, slots=True)
class OpenedDraft:
    """A draft model that lacks nothing but its part of the KV pool."""

    opened: OpenedModel

    def block_bytes(self, block_size: int) -> int:
        """What it adds to a block."""
        return bytes_per_block(self.opened.source.layers, block_size, self.opened.kv_dtype)

    def load(self, num_blocks: int, block_size: int, max_model_len: int, device: torch.device) -> LoadedDraft:
        """All its layers are one group: its blocks are those of the large model's first group."""
        opened = self.opened
        cache = KVCache(
            opened.source.layers,
            opened.backend,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=opened.kv_dtype,
            device=device,
        )
        return LoadedDraft(opened.packed.model(max_model_len), cache, opened.config.vocab_size)


def open_draft(
    config: EngineConfig,
    model_path: str,
    groups: Sequence[LayerGroup],
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int,
) -> OpenedDraft:
    """Open `config.speculative_model` to guess for the model at `model_path`, whose layers are in these groups.

    Raises `UnsupportedModelError` if it cannot, and what `open_model` raises.
    """
    path = config.speculative_model
    assert path is not None
    if groups[0].window is not None:
        raise UnsupportedModelError(
            "--speculative-model: every layer of the model that is served has a sliding window, and a draft model "
            "needs the blocks of the whole context"
        )
    _check_vocabularies(path, model_path)
    quantization = "auto" if config.quantization == "stored" else config.quantization
    own = config.model_copy(update={"quantization": quantization})
    try:
        opened = open_model(own, path, device=device, dtype=dtype, num_threads=num_threads)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"--speculative-model {path}: {error}") from error
    if opened.source.own is not None:
        raise UnsupportedModelError(
            f"--speculative-model {path}: it keeps a state from which no token can be taken back"
        )
    return OpenedDraft(opened)


def _check_vocabularies(draft_path: str, model_path: str) -> None:
    """A guess is a token's number: it has to mean the same to both."""
    draft, model = Tokenizer(draft_path).vocabulary(), Tokenizer(model_path).vocabulary()
    if draft == model:
        return
    alike = sum(model.get(token) == number for token, number in draft.items())
    raise UnsupportedModelError(
        f"--speculative-model {draft_path}: its vocabulary is another than that of the model it would guess for: "
        f"of its {len(draft):,} tokens {alike:,} have the same number among the {len(model):,} there. Take a "
        "small model of the same family"
    )
