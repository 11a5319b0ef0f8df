"""What transformers' modules of a fused family make of two short sequences with a checkpoint's weights, which are
read by second_reader.py, in float32 and with one of them in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from scheduler.models.checks.second_reader import SecondReader
from scheduler.models.files.checkpoint import CheckpointError, other_shape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

NO_WEIGHTS = ("inv_freq", "masked_bias", "attn.bias")
"""What old checkpoints have beside them."""

NUM_SEQUENCES, LENGTH = 2, 24
"""The latter in tokens."""

FAR = 8192
"""How far into a context the second half of a sequence lies, at most: what slows positions down shows there."""


@dataclass(frozen=True, slots=True)
class Reference:
    ids: list[int]
    """The tokens of the sequences, one after the other."""
    positions: list[int]
    """Of each token of a sequence."""
    entered: list[Tensor]
    """Before each layer and after the last one: [tokens, hidden size]."""
    logits: Tensor
    """[tokens, ids]: of the tokens `ids` alone."""


def tried_tokens(vocab_size: int) -> list[int]:
    """Token ids from the whole vocabulary, in no order; the first again where there are too few."""
    count = NUM_SEQUENCES * LENGTH
    ids = torch.linspace(0, vocab_size - 1, count, dtype=torch.float64).long()
    return ids[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()


def positions_in(longest: int) -> list[int]:
    """Those of the first half of a sequence, and far from it those of the second; `longest`: of its positions."""
    half = LENGTH // 2
    far = max(half, min(longest, FAR) - half)
    return [*range(half), *range(far, far + half)]


@torch.inference_mode()
def reference(config: PretrainedConfig, reader: SecondReader, longest: int) -> Reference:
    """Raises `CheckpointError` where the model and the file do not have the same weights."""
    # Both take part of a second to import, and a model is checked once.
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    ids = tried_tokens(config.vocab_size)
    narrow = copy.deepcopy(config)
    narrow.vocab_size = len(ids)
    narrow.pad_token_id = None  # it may be beyond the vocabulary
    for name, value in reader.settings.items():
        setattr(narrow, name, value)
    with init_empty_weights(include_buffers=False):
        module: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            narrow, dtype=torch.float32, attn_implementation="eager"
        )
    module.eval()
    if reader.rope_factors is not None:
        module.model.rotary_emb.inv_freq /= reader.rope_factors
    entered: list[Tensor] = []
    for part in (*module.model.layers, module.model.norm):
        part.register_forward_pre_hook(lambda _, given: entered.append(given[0].flatten(0, 1)))
    names = list(module.state_dict())
    _compare_names(names, reader)
    with tqdm(total=len(names), desc="checking the weights", unit="weight", delay=2) as progress:
        attach_align_device_hook(
            module,
            torch.device("cpu"),
            offload=True,
            weights_map=_Floats(module.state_dict(), reader, ids, progress.update),
        )
        positions = positions_in(longest)
        logits: Tensor = module(
            input_ids=torch.arange(len(ids)).view(NUM_SEQUENCES, LENGTH),
            position_ids=torch.tensor(positions).expand(NUM_SEQUENCES, -1),
            attention_mask=torch.ones(NUM_SEQUENCES, LENGTH, dtype=torch.int64),  # or a gap begins another text
            use_cache=False,
        ).logits
    return Reference(ids, positions, entered, logits.flatten(0, 1))


def _compare_names(names: Sequence[str], reader: SecondReader) -> None:
    has = {name for name in reader.names if not name.endswith(NO_WEIGHTS)}
    needed = set(names) - ({HEAD} if HEAD not in has else set())
    for left, what in ((needed - has, "lacks"), (has - needed, "has, unlike this model,")):
        if left:
            raise CheckpointError(f"the checkpoint {what} {', '.join(sorted(left)[:3])}")


class _Floats(Mapping[str, Tensor]):
    """A checkpoint's weights; of the vocabulary, the rows of some tokens."""

    def __init__(
        self,
        expected: Mapping[str, Tensor],
        reader: SecondReader,
        ids: Sequence[int],
        was_read: Callable[[], object],
    ) -> None:
        self._shapes = {name: weight.shape for name, weight in expected.items()}
        self._reader = reader
        self._ids = list(ids)
        self._was_read = was_read

    def __getitem__(self, name: str) -> Tensor:
        self._was_read()
        stored = EMBEDDING if name == HEAD and HEAD not in self._reader.names else name
        values = self._reader.floats(stored, self._ids if stored in (HEAD, EMBEDDING) else None)
        if values.shape != self._shapes[name]:
            raise CheckpointError(other_shape(stored, values.shape, self._shapes[name]))
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.names)

    def __len__(self) -> int:
        return len(self._reader.names)
