"""A mask that takes longer than a step makes its own user wait; what ends an answer is a count of work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scheduler.config import EngineConfig
from scheduler.core.plan import Chunk, Plan
from scheduler.core.request import FinishReason, Request
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.core.sequence import Sequence
from scheduler.process.engine_core import EngineCore
from scheduler.process.mask_turns import MOST_ALONE, MaskTurns
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import SequenceOutput

AMBIGUOUS = "start: a\na: " + " | ".join(["a a", '"x"', *(" ".join("a" * length) for length in range(3, 10))])
HELD = SamplingParams(max_tokens=99, n=4, grammar=GrammarSpec(GrammarKind.LARK, AMBIGUOUS))


def running(user: str, params: SamplingParams) -> list[Chunk]:
    request = Request(request_id=f"of {user}", prompt_token_ids=[7], params=params, user=user)
    return [Chunk(Sequence(request, index), 5, 1, index, True) for index in range(params.n)]


def test_who_has_used_more_than_their_part_rests_and_nobody_for_ever() -> None:
    turns, bobs, alices = MaskTurns(), running("bob", SamplingParams()), running("alice", HELD)
    masks: dict[int, int] = {}
    spent = total = 0.0
    for _ in range(400):
        plan = Plan([*bobs, *alices])
        turns.rest(plan)
        assert bobs[0] in plan.chunks
        num_masks = len(plan.chunks) - 1
        for chunk in plan.chunks[1:]:
            masks[chunk.sequence.index] = masks.get(chunk.sequence.index, 0) + 1
        spent += 0.02 * num_masks
        total += (duration := 0.008 + 0.02 * num_masks)
        turns.learn(plan, {"of alice": 0.02} if num_masks else {}, duration)
    assert 0.15 < spent / total < 0.35
    assert len(masks) == 4
    assert max(masks.values()) - min(masks.values()) <= 1, "each has its turn"


def test_quick_masks_wait_for_nobody() -> None:
    turns, bobs, alices = MaskTurns(), running("bob", SamplingParams()), running("alice", HELD)
    for _ in range(100):
        plan = Plan([*bobs, *alices])
        turns.rest(plan)
        assert len(plan.chunks) == 5
        turns.learn(plan, {"of alice": 0.0001}, 0.01)


def test_alone_a_step_is_bounded_and_somebody_is_always_in_it() -> None:
    turns, alices = MaskTurns(), running("alice", HELD)
    for seconds, at_most in ((MOST_ALONE / 2, 3), (10 * MOST_ALONE, 1)):
        turns.learn(Plan(alices), {"of alice": seconds}, 4 * seconds)
        plan = Plan(list(alices))
        turns.rest(plan)
        assert 1 <= len(plan.chunks) <= at_most


@pytest.fixture(scope="module")
def engine(model_path: str) -> Iterator[EngineCore]:
    core = EngineCore(EngineConfig(dtype="float32", max_num_seqs=8, kv_cache_memory=2**26), model_path)
    core.learn_tokenizer(Tokenizer(model_path).definition())
    yield core


def answers(engine: EngineCore, *requests: Request) -> dict[tuple[str, int], list[SequenceOutput]]:
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    for request in requests:
        assert not engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault((output.request_id, output.index), []).append(output)
    return outputs


def test_too_much_work_ends_an_answer_at_the_same_token_in_any_company(
    engine: EngineCore, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(
        max_tokens=60, temperature=1.0, seed=3, grammar=GrammarSpec(GrammarKind.LARK, AMBIGUOUS), ignore_eos=True
    )
    one = Request(request_id="one", prompt_token_ids=[1, 504, 260], params=params, user="alice")
    free = SamplingParams(max_tokens=90, ignore_eos=True)
    found = []
    for others in (0, 5):
        company = [
            Request(request_id=f"{number}", prompt_token_ids=[1, 200 + number], params=free, user="bob")
            for number in range(others)
        ]
        outputs = answers(engine, one, *company)
        for (name, _), said in outputs.items():
            assert said[-1].finish_reason is (FinishReason.REFUSED if name == "one" else FinishReason.LENGTH)
        said = outputs["one", 0]
        assert said[-1].error is not None
        assert "items" in said[-1].error
        found.append([token for output in said for token in output.token_ids])
    assert found[0] == found[1]
    assert found[0], "some of it came"
    assert "Traceback" not in caplog.text
    assert "failed" not in caplog.text
