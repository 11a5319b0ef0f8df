"""Same bits, whoever rides along: tokens and logprobs of a request do not depend on its company or its history."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from scheduler.config import EngineConfig
from scheduler.engine import EngineCore
from scheduler.messages import TokenLogprobs
from scheduler.request import Request, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, seed=0, logprobs=5)
MODES = {
    "int8": {"quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "float32": {"dtype": "float32", "quantization": "none"},
}


@dataclass
class Answer:
    """Everything that one request was given."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


def answers(core: EngineCore, prompts: list[list[int]]) -> tuple[list[Answer], int]:
    """Run all prompts together; returns their answers, and how many preemptions there were."""
    result = [Answer() for _ in prompts]
    num_preemptions = 0
    for number, prompt in enumerate(prompts):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=PARAMS))
    while core.has_work:
        outputs = core.step()
        assert outputs.step is not None
        num_preemptions += outputs.step.num_preemptions
        for output in outputs.outputs:
            answer = result[int(output.request_id)]
            answer.tokens += output.token_ids
            answer.logprobs += output.logprobs or []
    return result, num_preemptions


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_logprobs_have_the_same_bits(mode: str, model_path: str, prompts: list[list[int]]) -> None:
    def engine(**knobs: object) -> EngineCore:
        return EngineCore(EngineConfig(**MODES[mode], **{"kv_cache_memory": "1GB", **knobs}), model_path)  # type: ignore[arg-type]

    one = 5  # whose answer is watched
    core = engine()
    (alone,), _ = answers(core, [prompts[one]])
    assert len(alone.logprobs) == 64

    (cached,), _ = answers(core, [prompts[one]])
    assert cached == alone, "its prefix was cached"

    together, _ = answers(core, prompts)
    assert together[one] == alone, "among 31 others"

    chunked, _ = answers(engine(max_batched_tokens=16), prompts)
    assert chunked[one] == alone, "in chunks of 16 tokens"

    per_token = 30 * 2 * 3 * 64 * (4 if mode == "float32" else 2)
    tight = engine(kv_cache_memory=1193 * per_token, max_model_len=700)
    squeezed, num_preemptions = answers(tight, prompts)
    assert num_preemptions > 0
    assert squeezed == together, "after preemption"
