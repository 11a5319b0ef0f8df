"""Layers that keep a state for each sequence: convolutions, linear attention, state spaces.

All else of such a model runs on the packed batch. These layers take it apart: sequences that decode one token
go through them together, their states side by side; a chunk of a prompt goes through alone, and where a layer
cannot go on with a chunk, one token after the other. A state is what transformers' caches have for such a
layer. The states before a step are kept until the next, so that a step which failed for another's sake can be
run again. Some are put aside, for sequences that begin with the same tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from scheduler.attention import PackedBatch
from scheduler.core.step import StateMove
from scheduler.models.model_config import UnsupportedModelError

UPDATES = ("update_conv_state(", "update_recurrent_state(")
"""By what the code of such a layer is known."""

NAME = "carousel_states"
"""Of the attribute by which a model has them."""

TRIED = (5, 4)
"""Tokens of two chunks, with which it is found out whether a layer can go on with the second."""

SAME = 0.05
"""By which part of its size an output may differ for rounding. A state that is not looked at makes more of it."""

LayerState = Any
"""What transformers' caches have for one layer, of one sequence or of several: a LinearAttentionLayer."""


@dataclass(slots=True)
class SequenceStates:
    """What a sequence has left behind after some tokens: of each layer, by its number."""

    num_tokens: int = 0
    layers: dict[int, LayerState] = field(default_factory=dict)


@dataclass(slots=True)
class _Step:
    """The sequences of one forward pass."""

    query_lens: list[int]
    before: list[SequenceStates]
    after: list[SequenceStates]


class StateLayers:
    """Those of one model, and what its sequences keep, by seat."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._fresh = DynamicCache(config=config).layers
        self.kept: dict[int, list[SequenceStates]] = {}
        self._saved: dict[int, SequenceStates] = {}
        self._step: _Step | None = None
        self._goes_on: dict[type[nn.Module], bool] = {}
        """Which layers take several tokens where there are some before them."""

    @classmethod
    def take_apart(cls, model: nn.Module, config: PretrainedConfig) -> bool:
        """Let a model's layers that keep a state keep it here; returns whether it has any."""
        modules = [module for module in model.modules() if _keeps_state(module)]
        if modules:
            states = cls(config)
            for module in modules:
                if type(module) not in states._goes_on:
                    states._goes_on[type(module)] = states._tries_to_go_on(module, config.hidden_size)
                module.forward = _Forward(states, module)
            setattr(model, NAME, states)
        return bool(modules)

    @contextlib.contextmanager
    def step(self, batch: PackedBatch) -> Iterator[None]:
        """The layers run on this batch in here. If that fails, everything stays as it was before."""
        before = [
            self._states_at(seat, context - length)
            for seat, length, context in zip(batch.seats, batch.query_lens, batch.contexts, strict=True)
        ]
        after = [SequenceStates(context) for context in batch.contexts]
        self._step = _Step(batch.query_lens, before, after)
        try:
            yield
        finally:
            self._step = None
        for seat, *states in zip(batch.seats, before, after, strict=True):
            self.kept[seat] = states

    def vacate(self, seat: int) -> None:
        """Whoever had this seat has left it."""
        self.kept.pop(seat, None)

    def save(self, move: StateMove) -> None:
        """Put a copy of a seat's states into a slot."""
        states = self._states_at(move.seat, move.num_tokens)
        layers = {number: _joined([layer]) for number, layer in states.layers.items()}
        self._saved[move.slot] = SequenceStates(move.num_tokens, layers)

    def load(self, move: StateMove) -> None:
        """Give a seat the states in a slot: no step changes them, all make new ones."""
        saved = self._saved[move.slot]
        if saved.num_tokens != move.num_tokens:
            raise RuntimeError(f"the states in slot {move.slot} are of {saved.num_tokens} tokens, not {move}")
        self.kept[move.seat] = [saved]

    def nbytes(self, seat: int) -> int:
        """What is kept for the sequence on a seat."""
        layers = [layer for kept in self.kept[seat] for layer in kept.layers.values()]
        tensors = [tensor for layer in layers for states in _dicts(layer).values() for tensor in states.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """What one layer makes of a packed batch, [1, T, hidden size]."""
        number: int = module.layer_idx  # type: ignore[assignment]
        step = self._step
        if step is None:  # tokens of one sequence, of which nothing is kept
            return _call(module, hidden, None)
        rows = torch.split(hidden[0], step.query_lens)
        outputs: list[Tensor] = [torch.empty(0)] * len(rows)
        decoding = [
            place for place, length in enumerate(step.query_lens) if length == 1 and step.before[place].num_tokens
        ]
        for place in range(len(rows)):
            if place not in decoding:
                known = step.before[place].layers.get(number)
                state = copy.deepcopy(self._fresh[number]) if known is None else _joined([known])
                at_once = known is None or self._goes_on[type(module)]
                parts = [rows[place]] if at_once else torch.split(rows[place], 1)
                cache = _cache(state, number)
                outputs[place] = torch.cat([_call(module, part.unsqueeze(0), cache)[0] for part in parts])
                step.after[place].layers[number] = state
        if decoding:
            state = _joined([step.before[place].layers[number] for place in decoding])
            together = _call(module, torch.stack([rows[place] for place in decoding]), _cache(state, number))
            for row, place in enumerate(decoding):
                outputs[place] = together[row]
                step.after[place].layers[number] = _part(state, row)
        return torch.cat(outputs).unsqueeze(0)

    @torch.inference_mode()
    def _tries_to_go_on(self, module: nn.Module, hidden_size: int) -> bool:
        """Whether a layer makes the same of some tokens in two chunks as at once."""
        number: int = module.layer_idx  # type: ignore[assignment]
        weight = next(module.parameters())
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, sum(TRIED), hidden_size, generator=random).to(weight)
        whole = _call(module, hidden, None)
        cache = _cache(copy.deepcopy(self._fresh[number]), number)
        parts = torch.cat([_call(module, part, cache) for part in torch.split(hidden, list(TRIED), dim=1)], dim=1)
        return bool((parts - whole).norm() <= SAME * whole.norm())

    def _states_at(self, seat: int, num_tokens: int) -> SequenceStates:
        if num_tokens == 0:
            return SequenceStates()
        for kept in self.kept.get(seat, ()):
            if kept.num_tokens == num_tokens:
                return kept
        raise RuntimeError(f"there is no state of the sequence on seat {seat} after {num_tokens} tokens")


@dataclass(slots=True)
class _Forward:
    """Takes the place of a layer's forward pass."""

    states: StateLayers
    module: nn.Module

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.states.run(self.module, hidden_states)


def states_of(model: nn.Module) -> StateLayers | None:
    return getattr(model, NAME, None)


def _keeps_state(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and _updates_state(type(module))  # type: ignore[arg-type]


@functools.cache
def _updates_state(kind: type[nn.Module]) -> bool:
    takes_cache = "cache" in inspect.signature(kind.forward).parameters
    return takes_cache and any(update in inspect.getsource(kind) for update in UPDATES)


def _call(module: nn.Module, hidden: Tensor, cache: Cache | None) -> Tensor:
    output = type(module).forward(module, hidden, cache=cache)
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} gives more than its output")
    return output


def _cache(state: LayerState, number: int) -> Cache:
    """One in which every layer up to this one is the same."""
    return Cache(layers=[state] * (number + 1))


def _dicts(state: LayerState) -> dict[str, dict[int, Tensor]]:
    """Its tensors, [sequences, ...], by name and number."""
    return {
        name: {number: tensor for number, tensor in getattr(state, name).items() if tensor is not None}
        for name in ("conv_states", "recurrent_states")
    }


def _made(state: LayerState, dicts: dict[str, dict[int, Tensor]]) -> LayerState:
    """The same with other tensors."""
    made = copy.copy(state)
    for name, tensors in dicts.items():
        setattr(made, name, dict.fromkeys(getattr(state, name)) | tensors)
    return made


def _joined(states: list[LayerState]) -> LayerState:
    """A copy of the states of several sequences, side by side."""
    parts = [_dicts(state) for state in states]
    return _made(
        states[0],
        {
            name: {number: torch.cat([part[name][number] for part in parts]) for number in tensors}
            for name, tensors in parts[0].items()
        },
    )


def _part(joined: LayerState, row: int) -> LayerState:
    """One sequence's."""
    return _made(
        joined,
        {
            name: {number: tensor[row : row + 1] for number, tensor in tensors.items()}
            for name, tensors in _dicts(joined).items()
        },
    )
