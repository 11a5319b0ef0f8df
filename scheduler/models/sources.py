"""From a model's files to what runs it, in one arithmetic or another: through the native decoder, through
transformers' modules over the block pool, or through these one sequence after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from scheduler.attention import AttentionBackend, LayerSpec
from scheduler.attention.native_backend import NativeAttention
from scheduler.config import EngineConfig
from scheduler.execution.step_model import OwnState, StepModel
from scheduler.models.checks.probe import fused_obstacle
from scheduler.models.checks.reference import NUM_SEQUENCES, reference, tried_tokens
from scheduler.models.checks.second_reader import second_reader
from scheduler.models.checks.weights_check import (
    CUT,
    TOLERANCE,
    VERSION,
    difference_of_logits,
    fused_fault,
    reading_fault,
)
from scheduler.models.files.checkpoint import (
    BASE_EMBEDDING,
    Checkpoint,
    CheckpointError,
    NamedWeights,
    RenamedCheckpoint,
)
from scheduler.models.files.quantized_checkpoint import QuantizedCheckpoint, open_weights
from scheduler.models.fused.fused_model import FusedModel, can_fuse, shift_obstacle
from scheduler.models.fused.fused_weights import (
    FAMILIES,
    missing_weights,
    pack_layer,
    pack_weights,
    unexpected_weights,
)
from scheduler.models.fused.outline import outline
from scheduler.models.model_config import ModelConfig
from scheduler.models.module import open_module
from scheduler.models.modules.packed_linear import num_weights, pack_linears, weights_bytes
from scheduler.models.modules.paged_model import PagedModel, apply_rope_factors, check_complete, load_model
from scheduler.models.modules.plain_batch import run_packed
from scheduler.models.modules.sequential_model import SequentialModel
from scheduler.models.products import PLAIN_MODES, Mode, obstacle
from scheduler.models.remembered import Facts, model_version, remembered

logger = logging.getLogger(__name__)

NOT_NATIVE = "this model is not run by the native decoder, which turns the positions of what stays"


Fault = Callable[[AttentionBackend], str | None]
"""Says what is wrong with weights that are packed, if anything is."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights that are ready; what is left to know is how long a sequence can be."""

    nbytes: int
    bits: float
    """Of one weight, on average."""
    model: Callable[[int], StepModel]
    fault: Fault | None
    """None: they are transformers' modules as they are."""


class Source(Protocol):
    """A model that can be packed. `obstacle` says why its products are torch's, or is None."""

    layers: list[LayerSpec]
    """Those whose keys and values are in the block pool."""
    own: OwnState | None
    """What the model keeps beside it."""
    obstacle: str | None
    shift_obstacle: str
    """Why no tokens can be dropped from the middle of a context; empty: they can."""
    has_stored_weights: bool

    def pack(self, mode: Mode) -> Packed: ...


class FusedSource:
    """A model of the fused families, read from its checkpoint tensor by tensor."""

    own: OwnState | None = None
    obstacle: str | None = None

    def __init__(
        self,
        path: str,
        config: ModelConfig,
        shape: PagedModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        num_threads: int,
    ) -> None:
        self.layers = shape.layers
        self.shift_obstacle = shift_obstacle(config.text, shape.layers)
        self.has_stored_weights = checkpoint.is_quantized
        self._path = path
        self._whole_config = config
        self._config = config.text
        self._shape = shape
        self._checkpoint = checkpoint
        self._plain = PLAIN_MODES[dtype]
        self._num_threads = num_threads

    def pack(self, mode: Mode) -> Packed:
        weights = pack_weights(self._config, self._checkpoint, mode, self._plain, self._num_threads)

        def model(max_len: int) -> StepModel:
            return FusedModel(self._config, self._shape, weights, max_len=max_len, num_threads=self._num_threads)

        def fault(backend: AttentionBackend) -> str | None:
            try:
                reader = second_reader(self._path, self._whole_config.quantization)
                expected = reference(self._config, reader, self._whole_config.max_len)
            except CheckpointError as error:
                return str(error)
            return fused_fault(
                self._config,
                self._shape,
                weights,
                expected,
                mode=mode,
                exact=lambda number: pack_layer(self._config, self._checkpoint, number, "f32"),
                backend=backend,
                num_threads=self._num_threads,
            )

        return Packed(weights.nbytes, weights.bits, model, fault)


class SequentialSource:
    """A model whose sequences run one after the other, through transformers' modules alone."""

    has_stored_weights = False
    obstacle: str | None = "its sequences run one after the other, through transformers' modules"
    shift_obstacle = NOT_NATIVE

    def __init__(self, model: SequentialModel) -> None:
        self.layers: list[LayerSpec] = []
        self.own: OwnState | None = model.measure()
        self._model = model

    def pack(self, mode: Mode) -> Packed:
        return _of_modules(self._model)


class ModuleSource:
    """A model whose sequences run together: transformers' modules, with native products where there can be."""

    has_stored_weights = False
    shift_obstacle = NOT_NATIVE

    def __init__(self, paged: PagedModel, dtype: torch.dtype, num_threads: int) -> None:
        paged.module.to(dtype)  # type: ignore[arg-type]
        self.own: OwnState | None = paged.own_state()
        self.layers = paged.layers
        self.obstacle = obstacle(paged.device, dtype)
        self._paged = paged
        self._num_threads = num_threads

    def pack(self, mode: Mode) -> Packed:
        if self.obstacle is not None:
            return _of_modules(self._paged)
        packed = pack_linears(self._paged, mode, self._num_threads)

        def fault(backend: AttentionBackend) -> str | None:
            ids = tried_tokens(self._paged.config.vocab_size)
            sequences = [ids[number::NUM_SEQUENCES] for number in range(NUM_SEQUENCES)]
            dtype = self._paged.module.dtype
            theirs = run_packed(self._paged, backend, sequences, dtype=dtype)
            ours = run_packed(packed, backend, sequences, (CUT,), dtype=dtype)
            found = difference_of_logits(torch.cat(ours), torch.cat(theirs))
            if found <= TOLERANCE[mode]:
                return None
            return (
                f"with its weights packed for {mode} products the logits differ by {found:.3g} of their size from "
                f"those of transformers' modules, where at most {TOLERANCE[mode]:g} is rounding"
            )

        return _of_modules(packed, fault)


def _of_modules(model: PagedModel | SequentialModel, fault: Fault | None = None) -> Packed:
    nbytes = weights_bytes(model.module)
    return Packed(nbytes, 8 * nbytes / num_weights(model.module), lambda _: model, fault)


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
    text = model_config.text
    if (
        config.fused
        and config.attention_backend in ("auto", "native")
        and text.model_type in FAMILIES
        and obstacle(device, dtype) is None
    ):
        checkpoint = open_weights(path, model_config.quantization)
        if checkpoint is None:  # transformers says what there is instead
            load_model(path, model_config, device)
            raise CheckpointError(f"{path} has no weights that can be read")
        shape = outline(text)
        is_part = text is not model_config.whole or BASE_EMBEDDING in checkpoint
        if is_part and isinstance(checkpoint, NamedWeights):
            checkpoint = RenamedCheckpoint(checkpoint)
        missing = missing_weights(shape, checkpoint)
        check_complete((), unexpected_weights(shape, checkpoint))
        if missing:
            logger.info("not fused: the checkpoint has no %s", missing[0])
        elif can_fuse(text, shape.layers) and not NativeAttention.obstacle(
            shape.layers, config.block_size, dtype, device
        ):
            if (reason := fused_obstacle(text)) is None:
                apply_rope_factors(shape.module, checkpoint)
                return FusedSource(path, model_config, shape, checkpoint, dtype, num_threads)
            logger.warning("not fused: %s", reason)
    if model_config.quantization is not None:
        _check_reading(path, model_config.quantization)
    found = open_module(path, model_config, device, dtype)
    return (
        SequentialSource(found) if isinstance(found, SequentialModel) else ModuleSource(found, dtype, num_threads)
    )


def _check_reading(path: str, quantization: Mapping[str, Any]) -> None:
    """Of weights that are made floats here and given to transformers' modules. Raises `CheckpointError`."""

    def find() -> Facts:
        return {
            "fault": reading_fault(QuantizedCheckpoint.open(path, quantization), second_reader(path, quantization))
        }

    if fault := remembered("readings", (VERSION, path, model_version(path)), find)["fault"]:
        raise CheckpointError(fault)
