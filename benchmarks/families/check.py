"""One model type: a tiny model of it with random weights, served in every way, and its own forward pass beside."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import torch
from transformers import PreTrainedModel

from benchmarks.families.tiny import tiny_model
from scheduler.config import EngineConfig
from scheduler.core.plan import Plan
from scheduler.core.request import Request
from scheduler.models.fused.fused_model import FusedModel
from scheduler.models.model_config import UnsupportedModelError
from scheduler.models.modules.paged_model import PagedModel
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams

LENGTHS = (1, 3, 17, 40, 70, 97)
"""Of the prompts, in tokens: shorter and longer than any window or chunk of the tiny configurations."""

NUM_TOKENS = 16

TIE = 1e-3
"""Two tokens whose logits are closer than that are equally right."""

Verdict = Literal["exact", "wrong", "refused", "crashed", "not built", "too slow"]


class Found(msgspec.Struct):
    """What became of a type."""

    model_type: str
    verdict: Verdict
    path: str = ""
    """What ran it."""
    detail: str = ""


def check(model_type: str, **changes: Any) -> Found:
    """Build, with `changes` in its configuration, serve, compare."""
    try:
        model = tiny_model(model_type, **changes)
    except Exception as error:
        return Found(model_type, "not built", detail=_place(error))
    rng = random.Random(1)
    vocab_size = min(model.config.get_text_config(decoder=True).vocab_size, 199)
    prompts = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in LENGTHS]
    try:
        expected = [expected_tokens(model, prompt) for prompt in prompts]
    except Exception as error:
        return Found(model_type, "not built", detail=f"its own forward pass fails: {_place(error)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return Found(model_type, "not built", detail=_place(error))
        path = ""
        for way, run in WAYS.items():
            try:
                path, ours = run(folder, prompts)
            except UnsupportedModelError as error:
                return Found(model_type, "refused", path, str(error))
            except Exception as error:
                return Found(model_type, "crashed", path, f"{way}: {_place(error)}")
            for number, tokens in enumerate(ours):
                if wrong := difference(tokens, expected[number]):
                    return Found(model_type, "wrong", path, f"{way}, prompt {LENGTHS[number]}: {wrong}")
    return Found(model_type, "exact", path)


class Step(msgspec.Struct):
    """One token of a greedy answer, and how far below the best the others are."""

    token: int
    behind: list[float]


@torch.inference_mode()
def expected_tokens(model: PreTrainedModel, prompt: list[int]) -> list[Step]:
    """Each token from a forward pass over all before it, without any cache. Raises ValueError for no numbers."""
    tokens = list(prompt)
    steps = []
    for _ in range(NUM_TOKENS):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        if not logits.isfinite().all():
            raise ValueError("its logits are not numbers")
        tokens.append(int(logits.argmax()))
        steps.append(Step(tokens[-1], (logits.max() - logits).tolist()))
    return steps


def difference(tokens: list[int], expected: list[Step]) -> str:
    """Where an answer is another one than it should be, in words; empty: nowhere before a tie."""
    if len(tokens) != len(expected):
        return f"{len(tokens)} tokens"
    for place, (token, step) in enumerate(zip(tokens, expected, strict=True)):
        if token != step.token:
            behind = step.behind[token]
            return "" if behind < TIE else f"token {place}, {behind:.2g} below the best"
    return ""


def _alone(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    return [answers(core, [prompt])[0] for prompt in prompts]


def _cached(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    """What they share with the first run's, and with each other, is in the cache, where there is one."""
    answers(core, [[*prompt, 5] for prompt in prompts])
    return answers(core, prompts)


def _preempted(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    """Each sequence loses its seat once, in the middle of its answer."""
    core.observers.append(_Preempting(core))
    return answers(core, prompts)


class _Preempting:
    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._victims: set[tuple[str, int]] = set()

    def step(self, plan: Plan, started: float, stats: object, ended: object) -> None:
        for sequence in list(self._core.scheduler.running.values()):
            if sequence.key not in self._victims and sequence.num_output_tokens >= NUM_TOKENS // 2:
                self._victims.add(sequence.key)
                self._core.scheduler.admission.preempt(sequence)


def answers(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    """To prompts that are asked at once."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=0)
    tokens: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    while core.has_work:
        for output in core.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            tokens[int(output.request_id)] += output.token_ids
    return tokens


def _in_way(
    ask: Callable[[EngineCore, list[list[int]]], list[list[int]]], **knobs: Any
) -> Callable[[str, list[list[int]]], tuple[str, list[list[int]]]]:
    def run(folder: str, prompts: list[list[int]]) -> tuple[str, list[list[int]]]:
        sizes: dict[str, Any] = {"kv_cache_memory": "256MB", "max_num_seqs": 8, "threads": 1}
        config = EngineConfig(dtype="float32", **{**sizes, **knobs})
        core = EngineCore(config, folder)
        return path_of(core), ask(core, prompts)

    return run


def path_of(core: EngineCore) -> str:
    """What runs a model, in a word or two."""
    if not isinstance(core.model, PagedModel):
        return "native decoder" if isinstance(core.model, FusedModel) else "one by one"
    attention = f"{core.info.attention_backend} attention" if core.model.layers else "no attention"
    return f"together{', with states' if core.model.states is not None else ''}, {attention}"


WAYS = {
    "alone": _in_way(_alone),
    "batched": _in_way(answers),
    "chunked": _in_way(answers, max_batched_tokens=16),
    "cached": _in_way(_cached),
    "preempted": _in_way(_preempted),
}


def _place(error: Exception) -> str:
    """An error, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
