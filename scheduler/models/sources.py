"""From a model's files to what runs it, in one arithmetic or another: through the native decoder, or through
transformers' modules."""

from __future__ import annotations

import logging

import torch
from transformers import PretrainedConfig

from scheduler.attention import AttentionBackend
from scheduler.attention.native_backend import NativeAttention
from scheduler.config import EngineConfig
from scheduler.execution.step_model import OwnState
from scheduler.models.checks.reference import reference
from scheduler.models.checks.second_reader import second_reader
from scheduler.models.checks.weights_check import fused_fault
from scheduler.models.files.checkpoint import (
    BASE_EMBEDDING,
    Checkpoint,
    CheckpointError,
    GgufCheckpoint,
    NamedWeights,
    RenamedCheckpoint,
    check_complete,
)
from scheduler.models.files.quantized_checkpoint import open_weights
from scheduler.models.fused.fused_model import FusedModel, can_fuse, shift_obstacle
from scheduler.models.fused.fused_weights import (
    FAMILIES,
    missing_weights,
    pack_layer,
    pack_weights,
    unexpected_weights,
)
from scheduler.models.fused.outline import Outline
from scheduler.models.model_config import ModelConfig
from scheduler.models.packed import Packed, Source
from scheduler.models.products import PLAIN_MODES, Mode, obstacle
from scheduler.models.remembered import Facts, remembered_of_type

logger = logging.getLogger(__name__)

VERSION = 10
"""Of what is remembered of a fused family."""


class FusedSource:
    """A model of the fused families, read from its checkpoint tensor by tensor."""

    own: OwnState | None = None
    obstacle: str | None = None
    long_after: int | None = None

    def __init__(
        self,
        path: str,
        config: ModelConfig,
        outline: Outline,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        num_threads: int,
    ) -> None:
        self.layers = outline.layers
        self.shift_obstacle = shift_obstacle(config.text, outline.layers)
        self.has_stored_weights = checkpoint.is_quantized
        self._path = path
        self._whole_config = config
        self._config = config.text
        self._outline = outline
        self._checkpoint = checkpoint
        self._plain = PLAIN_MODES[dtype]
        self._num_threads = num_threads

    def pack(self, mode: Mode) -> Packed:
        weights = pack_weights(self._config, self._checkpoint, mode, self._plain, self._num_threads)
        model = FusedModel(self._config, self._outline, weights, self._num_threads)

        def fault(backend: AttentionBackend) -> str | None:
            try:
                reader = second_reader(self._path, self._whole_config.quantization)
                expected = reference(self._config, reader, self._whole_config.max_len)
            except CheckpointError as error:
                return str(error)
            return fused_fault(
                self._config,
                self._outline,
                weights,
                expected,
                mode=mode,
                exact=lambda number: pack_layer(self._config, self._checkpoint, number, "f32"),
                backend=backend,
                num_threads=self._num_threads,
            )

        return Packed(weights.nbytes, weights.bits, model, fault)


def open_source(
    config: EngineConfig,
    path: str,
    model_config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int,
) -> Source:
    """The quickest way to run this model. Raises `UnsupportedModelError`, `CheckpointError`, `GgufError` or
    OSError."""
    may_fuse = config.fused and config.attention_backend in ("auto", "native") and obstacle(device, dtype) is None
    if may_fuse and model_config.text.model_type in FAMILIES:
        fused = _open_fused(path, model_config, config.block_size, device, dtype, num_threads)
        if fused is not None:
            return fused
    from scheduler.models.module import open_modules  # transformers' modules take seconds to import

    return open_modules(path, model_config, device, dtype, num_threads)


def _open_fused(
    path: str,
    model_config: ModelConfig,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int,
) -> FusedSource | None:
    """Raises what `open_source` does."""
    text = model_config.text
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        return None  # the native decoder has one table of angles, whatever the length of a text
    checkpoint = open_weights(path, model_config.quantization)
    if checkpoint is None:  # transformers says what there is instead
        return None
    factors = None
    if isinstance(checkpoint, GgufCheckpoint):
        checkpoint.scale_positions(text)
        factors = checkpoint.rope_factors
    facts = remembered_of_type("fused", VERSION, text, _probe)
    outline = Outline.from_facts(facts)
    is_part = text is not model_config.whole or BASE_EMBEDDING in checkpoint
    if is_part and isinstance(checkpoint, NamedWeights):
        checkpoint = RenamedCheckpoint(checkpoint)
    check_complete((), unexpected_weights(text, outline, checkpoint))
    if missing := missing_weights(text, outline, checkpoint):
        logger.info("not fused: the checkpoint has no %s", missing[0])
        return None
    if not can_fuse(text, outline.layers) or NativeAttention.obstacle(outline.layers, block_size, dtype, device):
        return None
    if facts["obstacle"] is not None:
        logger.warning("not fused: %s", facts["obstacle"])
        return None
    return FusedSource(path, model_config, outline.slowed(factors), checkpoint, dtype, num_threads)


def _probe(config: PretrainedConfig) -> Facts:
    from scheduler.models.checks.fused_probe import find  # transformers' modules take seconds to import

    return find(config)
