"""EngineCore on a tiny model: what a step records, and how failures stay with whoever caused them."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from scheduler.attention import PackedBatch
from scheduler.config import EngineConfig
from scheduler.core.model import StepOutput
from scheduler.core.request import FinishReason, Request
from scheduler.core.step import StepInput
from scheduler.execution.runner import Launched
from scheduler.models.memory import KVCacheTooSmallError
from scheduler.process.engine_core import NO_TOKEN, EngineCore
from scheduler.sampling_params import SamplingParams
from tests.scheduler.engine_runs import run_all


def make_core(path: str, **knobs: Any) -> EngineCore:
    return EngineCore(EngineConfig(dtype="float32", **knobs), path)


def request(name: str, length: int = 5, max_tokens: int = 6, **params: Any) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[3 + (i * 7 + len(name)) % 190 for i in range(length)],
        params=SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, **params),
    )


def run_to_end(core: EngineCore) -> dict[str, tuple[int, FinishReason | None, str | None]]:
    """{request: (tokens, finish reason, error)}."""
    ends: dict[str, tuple[int, FinishReason | None, str | None]] = {}
    while core.has_work:
        for output in core.step().outputs:
            count = ends.get(output.request_id, (0, None, None))[0] + len(output.token_ids)
            ends[output.request_id] = (count, output.finish_reason, output.error)
    return ends


def test_a_newcomer_gets_its_first_token_before_the_others_finish(tiny_path: str) -> None:
    core = make_core(tiny_path)
    core.add(request("early", max_tokens=30))
    for _ in range(5):
        core.step()
    core.add(request("late", max_tokens=3))
    outputs = core.step().outputs
    assert [(output.request_id, len(output.token_ids)) for output in outputs] == [("early", 1), ("late", 1)]
    assert all(output.finish_reason is None for output in outputs)


def test_each_step_computes_exactly_the_planned_tokens(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(tiny_path, max_batched_tokens=16)
    computed: list[int] = []
    forward = core.model.forward

    def counting(batch: PackedBatch) -> StepOutput:
        computed.append(len(batch.input_ids))
        return forward(batch)

    monkeypatch.setattr(core.model, "forward", counting)
    run = run_all(core, [list(range(3, 3 + n)) for n in (1, 40, 7, 22)], SamplingParams(max_tokens=5, seed=1))
    assert [step.num_tokens for step in run.steps] == computed
    assert max(computed) <= 16
    assert (
        sum(step.num_prompt_tokens for step in run.steps) + sum(step.num_cached_tokens for step in run.steps) == 70
    )


def test_seeded_requests_draw_the_same_tokens_in_any_company(tiny_path: str) -> None:
    params = SamplingParams(max_tokens=20, seed=5, temperature=1.5, top_p=0.95, ignore_eos=True)
    prompt = list(range(10, 30))
    alone = run_all(make_core(tiny_path), [prompt], params).tokens[0]
    crowd = [[3 + i] * (i + 1) for i in range(20)]
    for knobs in ({}, {"max_batched_tokens": 16}, {"prefix_caching": False}):
        assert run_all(make_core(tiny_path, **knobs), [*crowd, prompt], params).tokens[-1] == alone


def test_a_request_that_fails_does_not_take_the_others_with_it(
    tiny_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(tiny_path)
    launch = core.executor.launch

    def failing(step: StepInput) -> Launched:
        if any(chunk.request_id == "bad" and chunk.start > 5 for chunk in step.chunks):
            raise ZeroDivisionError("a programming error")
        return launch(step)

    monkeypatch.setattr(core.executor, "launch", failing)
    for name in ("good", "bad", "fine"):
        core.add(request(name))
    ends = run_to_end(core)
    assert ends["good"] == ends["fine"] == (6, FinishReason.LENGTH, None)
    assert ends["bad"][:2] == (2, FinishReason.ERROR)
    assert "ZeroDivisionError: a programming error" in caplog.text, "the traceback is in the log"
    assert core.pool.num_used == 0


def test_logits_that_are_not_numbers_end_only_their_request(
    tiny_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(tiny_path)
    forward = core.model.forward

    def broken(batch: PackedBatch) -> StepOutput:
        output = forward(batch)
        output.logits[1] = float("nan")
        return output

    monkeypatch.setattr(core.model, "forward", broken)
    core.add(request("good", max_tokens=1))
    core.add(request("bad", max_tokens=1))
    ends = run_to_end(core)
    assert ends["good"][1] is FinishReason.LENGTH
    assert ends["bad"] == (0, FinishReason.ERROR, NO_TOKEN)
    assert core.pool.num_used == 0


def test_a_refused_request_is_answered_and_the_others_go_on(tiny_path: str) -> None:
    core = make_core(tiny_path)
    core.add(request("good"))
    (refusal,) = core.add(request("empty", length=0))
    assert refusal.finish_reason is FinishReason.ERROR
    assert "0 tokens in the prompt" in (refusal.error or "")
    assert run_to_end(core)["good"][0] == 6


def test_a_pool_too_small_for_the_asked_length_is_refused_with_what_to_do(tiny_path: str) -> None:
    with pytest.raises(
        KVCacheTooSmallError, match=r"raise --kv-cache-memory to at least .*, or lower --max-model-len"
    ):
        make_core(tiny_path, kv_cache_memory="40kB", max_model_len=500)


def test_a_small_pool_shortens_the_longest_length_when_none_was_asked_for(tiny_path: str) -> None:
    core = make_core(tiny_path, kv_cache_memory="200kB")
    assert core.info.max_model_len == core.info.num_blocks * 16 < 512


def test_a_deadline_ends_a_request_and_an_unreachable_one_is_refused_at_once(
    tiny_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(tiny_path)
    late = msgspec.structs.replace(request("late", max_tokens=200), deadline=time.monotonic() + 3600)
    assert core.add(late) == []
    core.step()
    now = time.monotonic
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: now() + 3601)
        (output,) = core.step().outputs
    assert output.finish_reason is FinishReason.TIMEOUT
    assert not core.has_work
    assert "failed" not in caplog.text, "a step with nothing left to do does nothing"
    hopeless = msgspec.structs.replace(request("hopeless"), deadline=time.monotonic())
    (refusal,) = core.add(hopeless)
    assert refusal.finish_reason is FinishReason.TIMEOUT
    assert "the answer would take" in (refusal.error or "")


@pytest.mark.breaks_accounts
@pytest.mark.parametrize("damage", ["leak", "freed", "seat", "content"])
def test_accounts_that_do_not_add_up_are_repaired(
    damage: str, tiny_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody's tokens are others."""

    def tokens(core: EngineCore, damaged: bool) -> dict[str, list[int]]:
        for number in range(4):
            core.add(request(str(number), length=40 + number, max_tokens=40))
        found: dict[str, list[int]] = {}
        num_violations = num_steps = 0
        while core.has_work:
            step = core.step()
            num_steps += 1
            if damaged and num_steps == 10:
                pool, seating = core.pool, core.scheduler.seating
                sequence = next(iter(core.scheduler.running.values()))
                match damage:
                    case "leak":
                        pool.allocate(3)
                    case "freed":
                        pool.free(sequence.held.tables[0].blocks[:1])
                    case "seat":
                        seating.free_seats.pop()
                    case "content":
                        pool.identities[sequence.held.tables[0].blocks[0]] = b"another"
            num_violations += step.step.num_violations if step.step is not None else 0
            for output in step.outputs:
                found.setdefault(output.request_id, []).extend(output.token_ids)
        assert (num_violations > 0) == damaged
        assert core.pool.num_used == 0
        return found

    expected = tokens(make_core(tiny_path), damaged=False)
    assert tokens(make_core(tiny_path), damaged=True) == expected
    assert "please report it" in caplog.text


def test_an_observer_that_fails_is_told_no_more(tiny_path: str, caplog: pytest.LogCaptureFixture) -> None:
    class FullDisk:
        def step(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    core = make_core(tiny_path)
    core.observers.append(FullDisk())
    core.add(request("a"))
    assert run_to_end(core) == {"a": (6, FinishReason.LENGTH, None)}
    assert not any(isinstance(each, FullDisk) for each in core.observers)
    assert caplog.text.count("it is told of no more steps") == 1
