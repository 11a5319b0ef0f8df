"""A model as transformers' modules, run the quickest way that is exact."""

from __future__ import annotations

import logging

import torch

from scheduler.models.checks.probe import sequential, truth, way_of
from scheduler.models.model_config import ModelConfig, UnsupportedModelError
from scheduler.models.modules.paged_model import PagedModel, load_model, load_modules
from scheduler.models.modules.sequential_model import SequentialModel

logger = logging.getLogger(__name__)


def open_module(
    path: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PagedModel | SequentialModel:
    """Load a model, and make sure that what it gives is what its own forward pass gives. One whose sequences run
    together has the type that its weights are stored in. Raises `UnsupportedModelError`, or transformers' OSError
    if nothing can be loaded from there."""
    way = way_of(config.whole)
    if way == "paged":
        return load_model(path, config, device)
    logger.warning("the sequences of this model run one after the other, which is slower than all together")
    module = load_modules(path, config, device, dtype)
    try:
        expected = truth(module)
    except Exception as error:
        raise UnsupportedModelError(f"its forward pass fails ({type(error).__name__}: {error})") from error
    return sequential(module, expected)
