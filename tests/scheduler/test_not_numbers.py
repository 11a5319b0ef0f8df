"""A request whose numbers are none fails and says so, in every arithmetic; its neighbours, and those who get its
blocks afterwards, notice nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.process.engine_core import NO_TOKEN, EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.test_families import tiny_model

POISON = 77
"""A token whose embedding has a NaN."""
PROMPTS = {"bad": [*range(20, 50), POISON, 9], "good": [*range(20, 60)]}


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_model("llama")
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    with torch.no_grad():
        embedding[POISON, 5] = torch.nan
    folder: Path = tmp_path_factory.mktemp("poisoned")
    model.save_pretrained(folder)
    return str(folder)


def answers(core: EngineCore, *names: str) -> dict[str, tuple[list[int], str | None]]:
    """The tokens of some prompts, and what is said where one fails."""
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    results: dict[str, tuple[list[int], str | None]] = {name: ([], None) for name in names}
    for name in names:
        assert core.add(Request(request_id=name, prompt_token_ids=PROMPTS[name], params=params)) == []
    while core.has_work:
        for output in core.step().outputs:
            tokens, error = results[output.request_id]
            results[output.request_id] = (tokens + output.token_ids, error or output.error)
    return results


@pytest.mark.parametrize(
    "knobs",
    [
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"dtype": "float32", "fused": False},
        {"dtype": "float32", "fused": False, "attention_backend": "torch"},
        {"dtype": "float32", "fused": False, "attention_backend": "flex"},
    ],
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
def test_it_is_the_request_that_fails(poisoned_path: str, knobs: dict[str, Any]) -> None:
    # Few blocks: whoever comes later gets those of who failed.
    few = {"kv_cache_memory": "60kB", "max_model_len": 64, "max_batched_tokens": 40, "prefix_caching": False}
    config = EngineConfig(device="cpu", **few, **knobs)
    expected = answers(EngineCore(config, poisoned_path), "good")["good"]
    assert len(expected[0]) == 6
    core = EngineCore(config, poisoned_path)
    together = answers(core, "bad", "good")
    assert together["bad"] == ([], NO_TOKEN)
    assert together["good"] == expected
    for _ in range(3):
        assert answers(core, "good")["good"] == expected
