"""Which way a model can be run exactly: its own forward pass, without any cache, is the truth.

A small copy of the model (small_copy.py) runs two sequences that are longer than its windows: packed into one
batch with paged attention, whole and in chunks, and one after the other with its own cache. What differs is not
used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from scheduler.attention import AttentionBackend
from scheduler.core.attention import TorchAttention
from scheduler.core.model import StepModel
from scheduler.models.checks.small_copy import randomize, small_copy
from scheduler.models.model_config import UnsupportedModelError, auto_class
from scheduler.models.modules.own_attention import attention_of
from scheduler.models.modules.paged_model import PagedModel
from scheduler.models.modules.plain_batch import chunks, run_packed
from scheduler.models.modules.sequential_model import MANNERS, SequenceState, SequentialModel
from scheduler.models.remembered import Facts, remembered_of_type

logger = logging.getLogger(__name__)

Way = Literal["paged", "sequential"]
"""All sequences in one packed batch, over the block pool; or each by itself, over its own cache."""

LENGTHS = (61, 47)
"""Of the two sequences, in tokens."""

CUTS = (17, 18, 40)
"""Where they are cut into chunks."""

Found = TypeVar("Found")

VERSION = 9
"""Of what is remembered."""


class CannotRunError(UnsupportedModelError):
    """It fails, rather than giving something else."""


def way_of(config: PretrainedConfig) -> Way | None:
    """How models of this configuration are run; None: its small copy cannot tell, so it takes the model itself.
    What was found is remembered. Raises `UnsupportedModelError` where no way is exact."""
    known = remembered_of_type("way", VERSION, config, _find_way)
    if "refused" in known:
        raise UnsupportedModelError(known["refused"])
    if "obstacle" in known:
        logger.info("not in one batch with paged attention: %s", known["obstacle"])
    way: Way | None = known["way"]
    return way


def _find_way(config: PretrainedConfig) -> Facts:
    try:
        expected = truth(small_model(config))
    except Exception as error:
        logger.info("there is no small copy of this model to try (%s: %s)", type(error).__name__, error)
        return {"way": None}
    try:
        check_paged(caught(partial(small_paged, config)), expected)
    except UnsupportedModelError as error:
        paged = str(error)
    else:
        return {"way": "paged"}
    try:
        sequential(small_model(config), expected)
    except CannotRunError:
        return {"way": None, "obstacle": paged}  # the copy may be at fault
    except UnsupportedModelError as error:
        return {"refused": f"{paged}; and {error}"}
    return {"way": "sequential", "obstacle": paged}


def small_model(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """In float32, with random weights. Raises whatever the model's classes do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: PreTrainedModel = auto_class(config).from_config(
            small_copy(config), dtype=torch.float32, attn_implementation=attention
        )
    randomize(module)
    return module.eval()  # type: ignore[no-untyped-call,no-any-return]


def small_paged(config: PretrainedConfig) -> PagedModel:
    return PagedModel(small_model(config, attention_of(config)))


def sequences(module: PreTrainedModel) -> list[list[int]]:
    """Of token ids, with which models are tried."""
    size = module.config.get_text_config(decoder=True).vocab_size
    return [
        [(3 + 7 * place * (number + 2)) % (size - 4) + 3 for place in range(length)]
        for number, length in enumerate(LENGTHS)
    ]


@torch.inference_mode()
def truth(module: PreTrainedModel) -> list[torch.Tensor]:
    """The logits of each sequence's tokens, [T, vocabulary]. Raises ValueError where they are not numbers."""
    logits = [
        module(input_ids=torch.tensor([ids], device=module.device), use_cache=False).logits[0].float()
        for ids in sequences(module)
    ]
    if not all(each.isfinite().all() for each in logits):
        raise ValueError("its logits are not numbers")
    return logits


def check_paged(model: PagedModel, expected: Sequence[torch.Tensor]) -> None:
    """Raises `UnsupportedModelError` where packed batches over the block pool give other logits."""
    check_packed(model, model.module, TorchAttention(), expected, "two packed sequences")


def check_packed(
    model: StepModel,
    module: PreTrainedModel,
    backend: AttentionBackend,
    expected: Sequence[torch.Tensor],
    what: str,
) -> None:
    for cuts, name in (((), what), (CUTS, f"{what} in chunks")):
        run = partial(run_packed, model, backend, sequences(module), cuts)
        found = caught(partial(run, dtype=module.dtype, device=module.device))
        _compare(found, expected, name, module)


def sequential(module: PreTrainedModel, expected: Sequence[torch.Tensor]) -> SequentialModel:
    """The model in the first manner in which its own cache gives the logits of its forward pass without one.
    Raises `UnsupportedModelError` if there is none."""
    what = f"the cache of {type(module).__name__}"
    failure = UnsupportedModelError(what)
    for manner in MANNERS:
        model = SequentialModel(module, manner)
        try:
            _compare(caught(partial(_sequentially, model, CUTS)), expected, what, module)
        except UnsupportedModelError as error:
            failure = error
        else:
            return model
    raise failure


def caught(run: Callable[[], Found]) -> Found:
    """What a model cannot do it says in many ways."""
    try:
        return run()
    except UnsupportedModelError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CannotRunError(f"it does not run so ({type(error).__name__}: {said})") from error


def _compare(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: str, module: PreTrainedModel
) -> None:
    """Rounding differs between two ways to compute the same; a wrong state differs by far more."""
    if [ours.shape for ours in found] != [theirs.shape for theirs in expected]:
        raise UnsupportedModelError(f"{what}: its logits have another shape than those of its own forward pass")
    largest = max(each.abs().max().item() for each in expected)
    tolerance = torch.finfo(module.dtype).eps ** 0.5 * max(1.0, largest)
    difference = max((ours - theirs).abs().max().item() for ours, theirs in zip(found, expected, strict=True))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{what}: the logits differ by {difference:.3g} from those of the model's own forward pass, where at "
            f"most {tolerance:.3g} is rounding"
        )


def _sequentially(model: SequentialModel, cuts: Sequence[int]) -> list[torch.Tensor]:
    """Both sequences in turns, so that what a model keeps for itself is found out."""
    tokens = sequences(model.module)
    started = [SequenceState() for _ in tokens]
    logits: list[list[torch.Tensor]] = [[] for _ in tokens]
    for begin, end in chunks(cuts, max(LENGTHS)):
        for number, ids in enumerate(tokens):
            if ids[begin:end]:
                logits[number].append(model.advance(started[number], ids[begin:end])[0].float())
    return [torch.cat(each) for each in logits]
