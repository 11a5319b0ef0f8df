"""Loads a transformers model and lets its attention read the block pool.

Any decoder-only model whose attention goes through transformers' attention interface works unchanged: Carousel
registers its paged attention there and hands each forward pass the packed batch. What each layer's attention
does (heads, sizes, window, soft cap, scale) is not guessed from the config: it is seen in one probe pass, whose
logits are then held against the model's own attention. A model that differs is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.core.attention import attend_sequence
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepOutput
from scheduler.core.step import StateMove
from scheduler.execution.step_model import OwnState
from scheduler.models.files.checkpoint import (
    OTHER_FACTORS,
    GgufCheckpoint,
    check_complete,
    gguf_file,
    other_shape,
)
from scheduler.models.files.gguf_architectures import OWN, scale_positions
from scheduler.models.files.gguf_file import GgufFile
from scheduler.models.files.quantized_checkpoint import QuantizedCheckpoint
from scheduler.models.model_config import ModelConfig, UnsupportedModelError, auto_class
from scheduler.models.modules.attention_interface import ATTENTION, Asked, Attend, attending
from scheduler.models.modules.latent_attention import absorb
from scheduler.models.modules.long_positions import positions_of
from scheduler.models.modules.long_positions import take_over as take_over_positions
from scheduler.models.modules.own_attention import attends_by_itself, attention_of, take_over
from scheduler.models.modules.plain_batch import plain_batch
from scheduler.models.modules.state_layers import StateLayers, states_of

logger = logging.getLogger(__name__)

PLAINLY_NAMED = frozenset({"llama", "gemma2", "gemma3", "nemotron"})
"""Of the architectures of GGUF that transformers has readers of their own for: those whose readers rename none."""

KINDS = ("full_attention", "sliding_attention")
"""Of layers, as configurations name those that look at everything and those that do not."""


class PagedModel:
    """A causal language model that runs on packed batches, with its KV in the block pool.

    Raises `UnsupportedModelError` if it cannot be served exactly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = model
        self.config: PretrainedConfig = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        take_over_positions(model, self.config)
        has_states = StateLayers.take_apart(model, self.config)
        specs = _probe(model, self.config)
        if not specs and not has_states:
            raise UnsupportedModelError(
                f"no layer of {type(model).__name__} goes through transformers' attention interface, or keeps a "
                "state that can be taken apart: they attend or keep states in a way of their own"
            )
        self.layers = [specs[layer] for layer in sorted(specs)]
        self._places = {layer: place for place, layer in enumerate(sorted(specs))}
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def bind(self, cache: KVCache, max_len: int) -> None:
        self._cache = cache

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> StepOutput:
        """One step: write the batch's KV, and return what its rows give."""
        cache = self._cache

        def attend(layer: int, asked: Asked) -> torch.Tensor:
            query, key, value, spec, *extras = asked
            place = cache.layers[self._places[layer]]
            return cache.backend.attend(query, key, value, place, batch, spec, *extras)

        return self._run(batch, attend)

    def _run(self, batch: PackedBatch, attend: Attend) -> StepOutput:
        states = torch.empty(0, self.config.hidden_size, device=self.device)

        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal states
            if len(batch.read_rows) > 0:
                states = output[0][0, batch.read_rows].float()

        positions = positions_of(self.module)
        # The base model is the one without the head, which makes logits of what this gives.
        with (
            self.module.base_model.register_forward_hook(read),
            contextlib.nullcontext() if self.states is None else self.states.step(batch),
            contextlib.nullcontext() if positions is None else positions.step(batch),
            attending(attend),
        ):
            output = self.module(
                input_ids=batch.input_ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                **({"logits_to_keep": batch.sample_rows} if self._keeps_rows else {}),
            )
        logits = output.logits[0]
        return StepOutput(logits if self._keeps_rows else logits[batch.sample_rows], states)

    @property
    def long_after(self) -> int | None:
        """Tokens of the longest text that does not have the positions of long ones, where there are such."""
        positions = positions_of(self.module)
        return None if positions is None else positions.long_after

    @property
    def states(self) -> StateLayers | None:
        """What its layers keep beside the pool."""
        return states_of(self.module)

    def vacate(self, seat: int) -> None:
        """Whoever had this seat has left it."""
        if (states := self.states) is not None:
            states.vacate(seat)

    def save_state(self, move: StateMove) -> None:
        """Put a copy of a seat's state into a slot."""
        assert self.states is not None
        self.states.save(move)

    def load_state(self, move: StateMove) -> None:
        """Give a seat the state in a slot."""
        assert self.states is not None
        self.states.load(move)

    @torch.inference_mode()
    def own_state(self) -> OwnState | None:
        """What it keeps for each sequence beside the pool, however long that is."""
        states = self.states
        if states is None:
            return None
        batch = plain_batch({0: list(range(1, 9))}, 0, width=1, block_size=8, device=self.device)
        self._run(batch, _attend_whole)
        nbytes = states.nbytes(0)
        states.vacate(0)
        return OwnState(0, per_seat=2 * nbytes, per_slot=nbytes)  # before a step and after it

    @torch.inference_mode()
    def try_out(self) -> torch.Tensor:
        """The logits of a few tokens, without the pool."""
        inputs = _few_tokens(self.module, self.config)
        with attending(_attend_whole):
            logits: torch.Tensor = self.module(**inputs).logits
        return logits


def _attend_whole(layer: int, asked: Asked) -> torch.Tensor:
    return attend_sequence(*asked)


def _few_tokens(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, Any]:
    ids = torch.arange(1, 9, device=model.device).remainder(config.vocab_size).unsqueeze(0)
    positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def load_model(path: str, config: ModelConfig, device: torch.device) -> PagedModel:
    """Load a model through transformers, in the type its weights are stored in; those of a GGUF file as float32.
    Raises `UnsupportedModelError`, or transformers' OSError if nothing can be loaded from there."""
    dtype = "auto" if gguf_file(path) is None else torch.float32
    return PagedModel(load_modules(path, config, device, dtype, attention_of(config.whole)))


def load_modules(
    path: str, config: ModelConfig, device: torch.device, dtype: torch.dtype | str, attention: str | None = None
) -> PreTrainedModel:
    """The same as transformers has it, with its own attention or another one. Raises what `load_model` does."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it takes a blink
    gguf = gguf_file(path)
    if gguf is None and _is_pickled(path):
        raise UnsupportedModelError(
            "its weights are a pickle (pytorch_model.bin), which can run code when it is read: convert them to "
            "safetensors, as model.save_pretrained of transformers writes them"
        )
    header = None if gguf is None else GgufFile(gguf)
    if header is not None:
        scale_positions(config.text, header)
    state = None
    loader = auto_class(config.whole)
    if (weights := own_reading(path, config)) is not None:
        state = {name: weights.weight(name) for name in weights.names}
        dtype = (config.whole.dtype or torch.float32) if dtype == "auto" else dtype
        loader = loader._model_mapping[type(config.whole)]  # the other one wants a path
        gguf = None
    model: Any
    found: dict[str, Any]
    try:
        model, found = loader.from_pretrained(
            path if state is None else None,
            state_dict=state,
            config=config.whole,
            gguf_file=None if gguf is None else gguf.name,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True if gguf is None else None,
            ignore_mismatched_sizes=True,  # which says it in words, below
            output_loading_info=True,
        )
        if header is not None:
            _apply_rope_factors(model, GgufCheckpoint(header).rope_factors)
            if weights is None:
                check_complete((), _left_out(model, header))
        for name, stored, expected in found.get("mismatched_keys", ()):
            raise UnsupportedModelError(other_shape(name, stored, expected))
        check_complete(found["missing_keys"], found["unexpected_keys"])
    # transformers' words for: not a causal language model, no such attention, no such architecture of GGUF; a
    # package that is not installed; weights of other shapes; a file that is not whole
    except (ValueError, NotImplementedError, ImportError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(" ".join(str(error).split())) from error
    model.to(device)
    module: PreTrainedModel = model.eval()
    return module


def own_reading(path: str, config: ModelConfig) -> QuantizedCheckpoint | GgufModules | None:
    """The weights, where it is not transformers that reads them: quantized ones, which are made floats, and GGUF
    files of architectures that it has a model for and no reader. Raises `CheckpointError` or `GgufError`."""
    if config.quantization is not None:
        return QuantizedCheckpoint.open(path, config.quantization)
    file = gguf_file(path)
    if file is None or (header := GgufFile(file)).architecture not in OWN:
        return None
    with torch.device("meta"):
        names = list(auto_class(config.whole).from_config(config.whole).state_dict())
    return GgufModules(GgufCheckpoint(header), names)


class GgufModules:
    """A GGUF file's weights by the names that they have in transformers' modules. Raises `CheckpointError` where
    it has others."""

    def __init__(self, checkpoint: GgufCheckpoint, names: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        self.names = [name for name in names if name in checkpoint]
        check_complete((), checkpoint.left_out(self.names))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def weight(self, name: str) -> torch.Tensor:
        return self._checkpoint.floats(name)


def _left_out(model: PreTrainedModel, file: GgufFile) -> list[str]:
    """Tensors of a GGUF file that transformers does not read into a model, without a word. Of architectures whose
    readers rename and divide tensors nothing is said."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if file.architecture in set(TENSOR_PROCESSORS) - PLAINLY_NAMED:
        return []
    processor: Any = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    taken = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    return [name for name in file.tensors if name not in taken and name != "rope_freqs.weight"]


def _is_pickled(path: str) -> bool:
    """Whether a folder has weights, and none that are safe to read."""
    folder = Path(path)
    return any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors"))


def _apply_rope_factors(model: PreTrainedModel, factors: torch.Tensor | None) -> None:
    """Slow the rotary embedding's frequencies down as a GGUF file says: transformers does not look for that."""
    if factors is None:
        return
    frequencies = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    if frequencies is None or frequencies.shape != factors.shape:
        raise UnsupportedModelError(OTHER_FACTORS)
    frequencies.div_(factors.to(frequencies.device))


@torch.inference_mode()
def _probe(model: PreTrainedModel, config: PretrainedConfig) -> dict[int, LayerSpec]:
    """Run a few tokens, note what each layer's attention asks for, and compare with the model's own attention."""
    specs: dict[int, LayerSpec] = {}

    def attend(layer: int, asked: Asked) -> torch.Tensor:
        if specs.setdefault(layer, asked.spec) != asked.spec:
            raise UnsupportedModelError(f"layer {layer} runs two different attentions")
        return _attend_whole(layer, asked)

    inputs = _few_tokens(model, config)
    if attends_by_itself(config):
        theirs = model(**inputs).logits.float()
        take_over(model)
    else:
        model.set_attn_implementation("eager")
        theirs = model(**inputs).logits.float()
        model.set_attn_implementation(ATTENTION)
    if model.device.type == "cpu":  # the attention of GPUs wants keys and values of all heads
        absorb(model)
    with attending(attend):
        ours = model(**inputs).logits.float()
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in KINDS or layer not in specs:
            continue
        if (kind == "sliding_attention") != (specs[layer].sliding_window is not None):
            raise UnsupportedModelError(
                f"layer {layer} is of type {kind}, but its attention is called with a window of "
                f"{specs[layer].sliding_window}"
            )
    # Rounding differs between two ways to compute the same; a wrong attention differs by far more.
    tolerance = torch.finfo(model.dtype).eps ** 0.5 * max(1.0, theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"paged attention does not give the logits of {type(model).__name__}'s own attention: they differ by "
            f"{difference:.3g} where at most {tolerance:.3g} is rounding"
        )
    return specs
