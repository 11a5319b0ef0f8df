"""The examples of docs/architecture.md do what the page says of them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer

from scheduler.client.async_engine import AsyncEngine
from scheduler.core.__main__ import engine_of
from scheduler.core.attention import TorchAttention
from scheduler.core.blocks import BlockPool
from scheduler.core.policy import Policy
from scheduler.core.request import FinishReason
from scheduler.core.scheduler import Scheduler
from scheduler.core.transformers_model import TransformersModel
from server.app import create_app
from server.config import ServeConfig
from tests.scheduler.test_scheduler import make_scheduler, request, run_step
from tests.server.scripted import ScriptedEngine, token

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
    return names


def test_a_policy(examples: dict[str, Any]) -> None:
    policy: Policy = examples["LastComeFirstServed"]()
    scheduler = Scheduler(BlockPool(64, 4), policy, max_num_seqs=1, max_batched_tokens=16, max_model_len=100)
    for name in ("first", "second", "third"):
        scheduler.add(request(name, 4, 2))
    order: list[str] = []
    while scheduler.has_work:
        order += [sequence.request.request_id for sequence in run_step(scheduler).admitted]
    assert order == ["third", "second", "first"]


def test_pacing(examples: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    scheduler.pacing = examples["HalfEachTime"]()
    sequences = [scheduler.add(request(name, 4, 9))[0] for name in "abcd"]
    run_step(scheduler)
    assert {len(run_step(scheduler).chunks) for _ in range(6)} == {2}
    assert {sequence.num_output_tokens for sequence in sequences} == {4}


@pytest.mark.parametrize(("token", "num_steps"), [(7, 5), (None, 8)])
def test_a_drafter(examples: dict[str, Any], token: int | None, num_steps: int) -> None:
    """Right where the same token comes again and again, and in vain where another one does each time."""
    scheduler = make_scheduler()
    scheduler.drafter = examples["AgainAndAgain"]()
    (sequence,) = scheduler.add(request("a", 4, 8))
    count = 0
    while scheduler.has_work:
        run_step(scheduler, token if token is not None else 10 + count)
        count += 1
    assert sequence.num_output_tokens == 8
    assert count == num_steps


def test_an_attention_backend(examples: dict[str, Any], tiny_path: str) -> None:
    answers = []
    for backend in (TorchAttention(), examples["DoubleAttention"]()):
        engine = engine_of(TransformersModel(tiny_path), 64, -1, backend)
        (sequence,) = engine.add(request("a", list(range(1, 10)), 8, temperature=0, ignore_eos=True))
        while engine.scheduler.has_work:
            engine.step()
        answers.append(sequence.token_ids)
    assert answers[0] == answers[1]


def test_a_store(examples: dict[str, Any]) -> None:
    store = examples["KnownPrefixes"]()
    scheduler = make_scheduler(states=store)
    scheduler.add(request("a", 8, 5))
    while scheduler.has_work:
        run_step(scheduler)
    assert len(store.identities) == 3, "of four tokens each"


async def test_a_dialect(examples: dict[str, Any]) -> None:
    engine = ScriptedEngine(token("Once"), token(" upon", finish_reason=FinishReason.LENGTH))
    engine.tokenizer = SimpleNamespace(longest_token=16, encode=lambda text, *_, **__: [7] * len(text))
    app = create_app(ServeConfig(), cast(AsyncEngine, engine), engine.registry)
    app.router.add_post("/lines", examples["say"])
    async with TestClient(TestServer(app)) as client:
        response = await client.post("/lines", data=b"a text", headers={"Content-Type": "application/json"})
        assert await response.text() == '{"said":"Once"}\n{"said":" upon"}\n'
