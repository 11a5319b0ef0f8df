"""A model as transformers' modules, run the quickest way that is exact: its sequences together, or one after the
other."""

from __future__ import annotations

import logging

import torch

from scheduler.attention import AttentionBackend, LayerSpec
from scheduler.execution.step_model import OwnState
from scheduler.models.checks.probe import sequential, truth, way_of
from scheduler.models.checks.reference import NUM_SEQUENCES, tried_tokens
from scheduler.models.checks.second_reader import second_reader
from scheduler.models.checks.weights_check import CUT, TOLERANCE, VERSION, difference_of_logits, reading_fault
from scheduler.models.files.checkpoint import CheckpointError
from scheduler.models.model_config import ModelConfig, UnsupportedModelError
from scheduler.models.modules.packed_linear import num_weights, pack_linears, weights_bytes
from scheduler.models.modules.paged_model import PagedModel, load_model, load_modules, own_reading
from scheduler.models.modules.plain_batch import run_packed
from scheduler.models.modules.sequential_model import SequentialModel
from scheduler.models.packed import Fault, Packed, Source
from scheduler.models.products import Mode, obstacle
from scheduler.models.remembered import Facts, model_version, remembered

logger = logging.getLogger(__name__)

NOT_NATIVE = "this model is not run by the native decoder, which turns the positions of what stays"


def open_modules(
    path: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, num_threads: int
) -> Source:
    """Load a model, and make sure that what it gives is what its own forward pass gives. One whose sequences run
    together has the type that its weights are stored in. Raises `UnsupportedModelError`, `CheckpointError`, or
    transformers' OSError if nothing can be loaded from there."""
    _check_reading(path, config)
    if way_of(config.whole) == "paged":
        return ModuleSource(load_model(path, config, device), dtype, num_threads)
    logger.warning("the sequences of this model run one after the other, which is slower than all together")
    module = load_modules(path, config, device, dtype)
    try:
        expected = truth(module)
    except Exception as error:
        raise UnsupportedModelError(f"its forward pass fails ({type(error).__name__}: {error})") from error
    return SequentialSource(sequential(module, expected))


class SequentialSource:
    """A model whose sequences run one after the other, through transformers' modules alone."""

    has_stored_weights = False
    obstacle: str | None = "its sequences run one after the other, through transformers' modules"
    shift_obstacle = NOT_NATIVE
    long_after: int | None = None

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
        self.long_after = paged.long_after
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
    return Packed(nbytes, 8 * nbytes / num_weights(model.module), model, fault)


def _check_reading(path: str, config: ModelConfig) -> None:
    """Of weights that are made floats here and given to transformers' modules. Raises `CheckpointError`."""

    def find() -> Facts:
        reading = own_reading(path, config)
        if reading is None:
            return {"fault": None}
        return {"fault": reading_fault(reading, second_reader(path, config.quantization))}

    if fault := remembered("readings", (VERSION, path, model_version(path)), find)["fault"]:
        raise CheckpointError(fault)
