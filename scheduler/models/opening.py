"""A model whose arithmetic is chosen, and whose weights are read: what is left to know is how long its sequences
are, and how many blocks there are for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from scheduler.attention import AttentionBackend, choose_backend
from scheduler.config import EngineConfig
from scheduler.kernels.native import kernels
from scheduler.models.checks.quantization import choose_mode, perplexity, text_tokens
from scheduler.models.checks.second_reader import second_ends
from scheduler.models.checks.weights_check import VERSION
from scheduler.models.files.checkpoint import CheckpointError
from scheduler.models.files.gguf_split import GgufError
from scheduler.models.memory import choose_kv_dtype
from scheduler.models.model_config import ModelConfig, UnsupportedModelError, read_config, with_what_is_stored
from scheduler.models.packed import Packed, Source
from scheduler.models.products import PLAIN_MODES, Mode
from scheduler.models.remembered import Facts, model_version, remembered
from scheduler.models.sources import FusedSource, open_source

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that lacks nothing but its KV pool."""

    config: ModelConfig
    source: Source
    backend: AttentionBackend
    mode: Mode
    """The arithmetic of its products, where they are not torch's."""
    packed: Packed
    kv_dtype: torch.dtype

    @property
    def max_len(self) -> int:
        """The longest sequence that is served exactly, in tokens."""
        return self.config.max_len if self.source.long_after is None else self.config.full_len


def open_model(
    config: EngineConfig, model_path: str, *, device: torch.device, dtype: torch.dtype, num_threads: int
) -> OpenedModel:
    """Raises `UnsupportedModelError`, `BackendError`, or transformers' OSError."""
    model_config = read_config(model_path)
    ends = remembered("ends", (VERSION, model_path, model_version(model_path)), lambda: _ends(model_path))["ids"]
    if lost := set(ends) - model_config.eos_token_ids:
        raise UnsupportedModelError(f"tokens that end its answers were not read from its files: {sorted(lost)}")
    if (Path(model_path) / ADAPTER).is_file():
        logger.warning("there is an adapter beside the model (%s), and it is not applied", ADAPTER)
    try:
        model_config = with_what_is_stored(model_path, model_config)
        source = open_source(config, model_path, model_config, device=device, dtype=dtype, num_threads=num_threads)
        backend = choose_backend(
            config.attention_backend,
            source.layers,
            block_size=config.block_size,
            dtype=dtype,
            device=device,
            num_threads=num_threads,
        )
        mode = _choose_products(config, source, backend, dtype, model_path)
        packed = source.pack(mode)
        fault = _fault(source, packed, backend, mode, model_path)
    except (CheckpointError, GgufError) as error:
        raise UnsupportedModelError(str(error)) from error
    if fault is None:
        return OpenedModel(model_config, source, backend, mode, packed, _kv_dtype(config, source, mode, dtype))
    if not isinstance(source, FusedSource):
        advice = "" if mode in PLAIN_MODES.values() else ": start it with --quantization none"
        raise UnsupportedModelError(f"{fault}{advice}")
    logger.warning("not fused: %s", fault)
    modules = config.model_copy(update={"fused": False})
    return open_model(modules, model_path, device=device, dtype=dtype, num_threads=num_threads)


def _ends(model_path: str) -> Facts:
    return {"ids": sorted(second_ends(model_path))}


def _fault(source: Source, packed: Packed, backend: AttentionBackend, mode: Mode, model_path: str) -> str | None:
    """What is wrong with packed weights, if anything is. What was found out about a checkpoint is remembered."""
    if (find := packed.fault) is None:
        return None
    versions = (
        VERSION,
        model_version(model_path),
        torch.__version__,
        transformers.__version__,
        kernels().version,
    )
    facts = (model_path, *versions, type(source).__name__, mode, backend.name)
    fault: str | None = remembered("weights", facts, lambda: {"fault": find(backend)})["fault"]
    return fault


def _choose_products(
    config: EngineConfig, source: Source, backend: AttentionBackend, dtype: torch.dtype, model_path: str
) -> Mode:
    """The arithmetic of the products. Where they are torch's it does not count."""
    wanted = config.quantization
    if wanted in ("int8", "int4", "stored") and source.obstacle is not None:
        raise UnsupportedModelError(f"--quantization {wanted}: {source.obstacle}")
    if wanted == "stored" and not source.has_stored_weights:
        raise UnsupportedModelError(
            "--quantization stored: it is for GGUF files with quantized weights, of the families that are fused"
        )
    if wanted == "int8" or wanted == "int4" or wanted == "stored":
        return wanted
    plain = PLAIN_MODES.get(dtype, "f32")
    if wanted == "none" or config.dtype != "auto" or source.obstacle is not None:
        return plain
    if source.has_stored_weights:
        return "stored"

    def measure(mode: Mode) -> float:
        model = source.pack(mode).model
        return perplexity(model, backend, text_tokens(model_path), _kv_dtype(config, source, mode, dtype))

    return choose_mode(model_path, plain, measure)


def _kv_dtype(config: EngineConfig, source: Source, mode: Mode, dtype: torch.dtype) -> torch.dtype:
    is_plain = source.obstacle is not None or mode in PLAIN_MODES.values()
    return choose_kv_dtype(config.kv_cache_dtype, dtype if is_plain else None, dtype)
