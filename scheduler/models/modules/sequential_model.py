"""Runs any causal model of transformers, one sequence after the other, as its own `generate` would.

For models whose state is more than keys and values (recurrent and convolutional layers, latents, indices), or that
attend in a way of their own. What a sequence leaves behind is the model's own cache object, kept by seat: nothing
of it lies in the block pool, so no prefix is shared, and after a preemption all is computed again. A row has the
same bits whoever else is in the batch, for nobody else is in its forward pass.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepOutput
from scheduler.execution.step_model import OwnState

MEASURED_TOKENS = 16
"""With which it is found out how much memory a sequence takes."""


@dataclass(slots=True)
class SequenceState:
    """What one sequence has left behind."""

    tokens: list[int] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    """What `generate` hands from one forward pass to the next."""
    last: tuple[int, StepOutput] | None = None
    """Where its last chunk began and what that gave: a step that failed for another's sake is run again."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a model's forward pass is to be called."""

    continues: bool
    """With several tokens when there are some before them; otherwise these go one at a time."""
    counts: bool
    """With each token's position, which most models count by themselves."""


MANNERS = (Manner(True, False), Manner(False, False), Manner(True, True), Manner(False, True))
"""In the order in which they are tried."""


class SequentialModel:
    """The `StepModel` of such a model."""

    def __init__(self, module: PreTrainedModel, manner: Manner) -> None:
        self.module = module
        self.layers: list[LayerSpec] = []
        self._manner = manner
        self.sequences: dict[int, SequenceState] = {}
        self._takes = set(inspect.signature(module.forward).parameters)

    def bind(self, cache: KVCache, max_len: int) -> None:
        """Nothing of it is in the pool."""

    def forward(self, batch: PackedBatch) -> StepOutput:
        """One step, of each sequence by itself."""
        rows = (batch.sample_rows.tolist(), batch.read_rows.tolist())
        outputs = []
        first = 0
        for seat, length, context in zip(batch.seats, batch.query_lens, batch.contexts, strict=True):
            sampled, read = ([row - first for row in of if first <= row < first + length] for of in rows)
            ids = batch.input_ids[first : first + length].tolist()
            outputs.append(self._run(seat, context - length, ids, sampled, read))
            first += length
        return StepOutput(
            torch.cat([each.logits for each in outputs]), torch.cat([each.states for each in outputs])
        )

    def measure(self) -> OwnState:
        """What it keeps for a sequence, as some tokens show."""
        sequence = SequenceState()
        self.advance(sequence, [3])
        few = _nbytes(sequence.kept)
        self.advance(sequence, [3] * MEASURED_TOKENS)
        per_token = -(-(_nbytes(sequence.kept) - few) // MEASURED_TOKENS)
        return OwnState(per_token, max(0, few - per_token))

    def vacate(self, seat: int) -> None:
        """Whoever had this seat has left it."""
        self.sequences.pop(seat, None)

    def _run(self, seat: int, start: int, ids: list[int], sampled: list[int], read: list[int]) -> StepOutput:
        """The next tokens of the sequence on a seat, that has `start` tokens before them."""
        if start == 0:
            self.sequences[seat] = SequenceState()
        sequence = self.sequences[seat]
        if sequence.last is not None and sequence.last[0] == start and len(sequence.tokens) == start + len(ids):
            return sequence.last[1]
        if len(sequence.tokens) != start:
            raise RuntimeError(f"of this sequence {len(sequence.tokens)} tokens were computed, and not {start}")
        try:
            logits, states = self.advance(sequence, ids)
        except BaseException:
            del self.sequences[seat]  # it is neither here nor there
            raise
        output = StepOutput(logits[sampled], states[read].float())
        sequence.last = (start, output)
        return output

    @torch.inference_mode()
    def advance(self, sequence: SequenceState, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a sequence's next tokens: logits [T, vocabulary], and their states [T, hidden size]."""
        size = len(ids) if self._manner.continues or not sequence.tokens else 1
        passes = [self._pass(sequence, ids[start : start + size]) for start in range(0, len(ids), size)]
        return torch.cat([logits for logits, _ in passes]), torch.cat([states for _, states in passes])

    def _pass(self, sequence: SequenceState, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        module = self.module
        is_first = not sequence.tokens
        sequence.tokens += ids
        tokens = torch.tensor([sequence.tokens], device=module.device)
        counted = {"position_ids": torch.arange(tokens.shape[1], device=module.device).unsqueeze(0)}
        inputs = module.prepare_inputs_for_generation(  # type: ignore[operator]
            tokens,
            next_sequence_length=len(ids),
            is_first_iteration=is_first,
            use_cache=True,
            attention_mask=torch.ones_like(tokens),
            **(counted if self._manner.counts and "position_ids" in self._takes else {}),
            **sequence.kept,
        )
        inputs.pop("next_sequence_length", None)
        inputs.pop("is_first_iteration", None)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 0  # all of them
        states = torch.empty(0)

        def read(of: object, given: object, output: Any) -> None:
            nonlocal states
            states = output[0][0]

        with module.base_model.register_forward_hook(read):
            output = module(**inputs, return_dict=True)
        kept = module._update_model_kwargs_for_generation(output, dict(sequence.kept))  # type: ignore[operator]
        sequence.kept = {
            name: value for name, value in kept.items() if name not in ("attention_mask", "position_ids")
        }
        # Models without a cache compute all tokens each time.
        return output.logits[0, -len(ids) :], states[-len(ids) :]


def _nbytes(kept: object) -> int:
    """Of all tensors in there."""
    tensors: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [kept]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        match thing:
            case torch.Tensor():
                tensors[id(thing)] = thing.nbytes
            case dict():
                waiting += thing.values()
            case list() | tuple() | set():
                waiting += thing
            case _ if hasattr(thing, "__dict__") and not isinstance(thing, type):
                waiting += vars(thing).values()
    return sum(tensors.values())
