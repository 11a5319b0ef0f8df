"""Embeddings on tiny models: those of transformers' hidden states, with the same bits in any company."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from scheduler.config import EngineConfig
from scheduler.core.request import FinishReason, Request
from scheduler.core.sampling import Pooling
from scheduler.embedding import Embedding
from scheduler.models.model_config import read_config
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.test_families import FAMILIES, tiny_model

RNG = random.Random(3)
PROMPTS = [[RNG.randrange(3, 199) for _ in range(length)] for length in (40, 1, 17, 90, 33, 64)]


def engine(path: Path, **knobs: object) -> EngineCore:
    return EngineCore(EngineConfig(dtype="float32", **{"kv_cache_memory": "8MB", **knobs}), str(path))


def embed(
    core: EngineCore, prompts: list[list[int]], pooling: Pooling, *, normalize: bool = True, preempt: bool = False
) -> npt.NDArray[np.float32]:
    """The vectors. A stream of text runs beside them, and each may lose its seat in the middle, and its blocks."""
    found = [Embedding(pooling, len(prompt)) for prompt in prompts]
    core.add(Request(request_id="beside", prompt_token_ids=[5, 6], params=SamplingParams(max_tokens=40, seed=0)))
    params = SamplingParams(max_tokens=0, pooling=pooling)
    for number, prompt in enumerate(prompts):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    ends = []
    preempted: set[str] = set()
    while core.has_work:
        step = core.step()
        for sequence in list(core.scheduler.running.values()) if preempt else []:
            name = sequence.request.request_id
            if 0 < sequence.num_computed_tokens < len(sequence.token_ids) and name not in {*preempted, "beside"}:
                core.scheduler.admission.preempt(sequence)
                preempted.add(name)
        for output in step.outputs:
            if output.request_id != "beside":
                found[int(output.request_id)].add(output.result.pooled)
                ends += [] if output.finish_reason is None else [output.finish_reason]
    assert ends == [FinishReason.LENGTH] * len(prompts)
    assert core.pool.num_used == 0
    assert len(preempted) == (5 if preempt else 0), "those of more than one chunk"
    return np.stack([each.vector(normalize=normalize) for each in found])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox", "olmo2"])
def test_they_are_made_of_what_transformers_has(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    model = tiny_model(name, **changes)
    model.save_pretrained(tmp_path)
    core = engine(tmp_path)
    with torch.inference_mode():
        states = [model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    expected = {"mean": [each.mean(dim=0) for each in states], "last": [each[-1] for each in states]}
    for pooling in get_args(Pooling):
        found = embed(core, PROMPTS, pooling, normalize=False)
        torch.testing.assert_close(torch.from_numpy(found), torch.stack(expected[pooling]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_the_same_bits_alone_cached_in_chunks_and_after_preemption(pooling: Pooling, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    core = engine(tmp_path)
    alone = np.concatenate([embed(core, [prompt], pooling) for prompt in PROMPTS])
    assert len({vector.tobytes() for vector in alone}) == len(PROMPTS)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1.0, atol=1e-6)
    assert np.array_equal(embed(core, PROMPTS, pooling), alone), "together, and cached"
    assert np.array_equal(embed(engine(tmp_path, max_batched_tokens=16), PROMPTS, pooling), alone), "in chunks"
    resumed = engine(tmp_path, max_batched_tokens=16, prefix_caching=False)
    assert np.array_equal(embed(resumed, PROMPTS, pooling, preempt=True), alone), "after preemption"


def test_what_is_no_number_ends_its_request_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[7] = torch.nan
    model.save_pretrained(tmp_path)
    core = engine(tmp_path)
    params = SamplingParams(max_tokens=0, pooling="mean")
    for name, prompt in (("good", [5, 6]), ("bad", [5, 7])):
        core.add(Request(request_id=name, prompt_token_ids=prompt, params=params))
    outputs = {output.request_id: output for output in core.step().outputs}
    assert outputs["good"].finish_reason is FinishReason.LENGTH
    assert outputs["bad"].finish_reason is FinishReason.ERROR


def test_the_models_folder_says_how(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).embeddings.pooling == "mean"
    (tmp_path / "1_Pooling").mkdir()
    for modes, expected in (
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 48}, "mean"),
        ({"pooling_mode_cls_token": True}, None),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        assert read_config(str(tmp_path)).embeddings.pooling == expected
