"""An answer that goes on beyond the model's window: the first block stays, the oldest behind it make room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.prove import answers
from scheduler.client.stream import make_request
from scheduler.config import EngineConfig
from scheduler.core.request import InvalidRequestError, Request
from scheduler.features.context_window import ContextWindow
from scheduler.models.model_config import UnsupportedModelError
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.engine_runs import ANY, Preempting
from tests.scheduler.test_families import tiny_model

BLOCK, WINDOW, ANSWER = 16, 96, 200
PROMPT = [(7 * place) % 90 + 5 for place in range(70)]
PARAMS = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, seed=0, logprobs=3, context_shift=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rotary")
    tiny_model("llama", max_position_embeddings=WINDOW + 5).save_pretrained(folder)
    return str(folder)


def engine(path: str, **knobs: Any) -> EngineCore:
    settings = {"dtype": "float32", "block_size": BLOCK, "kv_cache_memory": "4MB", "longest_step_ms": ANY}
    return EngineCore(EngineConfig(**{**settings, **knobs}), path)


@torch.inference_mode()
def streaming_llm(model: PreTrainedModel, num_tokens: int) -> list[int]:
    """The greedy answer, token by token, over transformers' cache: whenever it is full, the second block is cut
    out, and the keys of the first are turned on by all that was."""
    cache, tokens, dropped = DynamicCache(), list(PROMPT), 0
    sinks: list[torch.Tensor] = []

    def turned(keys: torch.Tensor, distance: int) -> Any:
        cos, sin = model.model.rotary_emb(keys, torch.tensor([[distance]]))
        half = keys.shape[-1] // 2
        return keys * cos + torch.cat((-keys[..., half:], keys[..., :half]), dim=-1) * sin

    for position in range(len(PROMPT) + num_tokens - 1):
        if cache.get_seq_length() == WINDOW:
            dropped += BLOCK
            layers: Any = cache.layers
            sinks = sinks or [layer.keys[:, :, :BLOCK].clone() for layer in layers]
            for layer, sink in zip(layers, sinks, strict=True):
                layer.keys = torch.cat((turned(sink, dropped), layer.keys[:, :, 2 * BLOCK :]), dim=2)
                layer.values = torch.cat((layer.values[:, :, :BLOCK], layer.values[:, :, 2 * BLOCK :]), dim=2)
        logits = model(
            torch.tensor([[tokens[position]]]), position_ids=torch.tensor([[position]]), past_key_values=cache
        ).logits
        if position >= len(PROMPT) - 1:
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_it_is_what_the_paper_says(path: str) -> None:
    core = engine(path)
    (answer,), _ = answers(core, [PROMPT], PARAMS)
    assert answer.tokens == streaming_llm(tiny_model("llama", max_position_embeddings=WINDOW + 5), ANSWER)
    assert core.pool.num_used == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_in_any_company_and_after_preemption(path: str, dtype: str) -> None:
    others = [PROMPT[place:] for place in range(1, 20)]
    params = msgspec.structs.replace(PARAMS, temperature=0.8)
    core = engine(path, dtype=dtype, speculative="off")
    (alone,), _ = answers(core, [PROMPT], params)
    assert len(alone.tokens) == ANSWER
    (cached,), _ = answers(core, [PROMPT], params)
    assert cached == alone, "its prefix was cached"
    together, _ = answers(core, [PROMPT, *others], params)
    assert together[0] == alone, "among others"
    cut: list[dict[str, Any]] = [{"max_batched_tokens": 16}, {"speculative": "ngram"}, {"max_num_seqs": 2}]
    for knobs in cut:
        found, _ = answers(engine(path, dtype=dtype, **knobs), [PROMPT, *others[:5]], params)
        assert found == together[:6], knobs
    squeezed: list[dict[str, Any]] = [{}, {"prefix_caching": False}, {"kv_cache_memory": "400kB"}]
    for knobs in squeezed:
        core = engine(path, dtype=dtype, **knobs)
        preempting = Preempting(core, after=120)
        found, _ = answers(core, [PROMPT, *others[:5]], params)
        assert found == together[:6], knobs
        assert len(preempting.victims) == 6
        assert core.pool.num_used == 0


def test_memory_does_not_grow(path: str) -> None:
    core = engine(path)
    most = 0

    class Watch:
        def step(self, *_: object) -> None:
            nonlocal most
            most = max(most, core.pool.num_used)

    core.observers.append(Watch())
    answers(core, [PROMPT], msgspec.structs.replace(PARAMS, max_tokens=core.info.shifted_len - len(PROMPT)))
    assert core.info.shifted_len == 8 * (WINDOW + 5)
    assert most <= WINDOW // BLOCK + 1, "the window, and the first block as it was"


def test_without_it_the_answer_ends_at_the_window(path: str) -> None:
    core = engine(path)

    def asked(**changes: Any) -> Request:
        params = SamplingParams(temperature=0, ignore_eos=True, **changes)
        return make_request("a", PROMPT, params, core.info, tokenizer=None)  # type: ignore[arg-type]

    assert asked().params.max_tokens == WINDOW + 5 - len(PROMPT)
    assert asked(context_shift=True).params.max_tokens == 8 * (WINDOW + 5) - len(PROMPT)
    assert asked(max_tokens=ANSWER).params.max_tokens == WINDOW + 5 - len(PROMPT)
    assert asked(max_tokens=3).params.max_tokens == 3
    with pytest.raises(InvalidRequestError, match="do not fit into 101"):
        core.scheduler.add(Request(request_id="b", prompt_token_ids=PROMPT * 2, params=PARAMS))


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "not rotary"), ("gpt_neox", "native decoder"), ("gemma3_text", "sliding windows")],
)
def test_models_that_cannot_say_why(family: str, reason: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    core = EngineCore(EngineConfig(dtype="float32", kv_cache_memory="4MB"), str(tmp_path))
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        make_request("a", [5, 6], PARAMS, core.info, tokenizer=None)  # type: ignore[arg-type]
    assert refused.value.param == "context_shift"
    with pytest.raises(UnsupportedModelError, match=f"--context-shift: .*{reason}"):
        EngineCore(EngineConfig(dtype="float32", kv_cache_memory="4MB", context_shift=True), str(tmp_path))


def test_what_is_dropped_follows_from_the_position() -> None:
    window = ContextWindow(num_tokens=96, block_size=16, longest=800)
    assert [window.shift_at(position) for position in (0, 95, 96, 111, 112, 500)] == [0, 0, 16, 16, 32, 416]
    assert [window.until_shift(position) for position in (0, 95, 96, 111, 112)] == [96, 1, 16, 1, 16]
    for position in range(800):
        assert position - window.shift_at(position) < 96
