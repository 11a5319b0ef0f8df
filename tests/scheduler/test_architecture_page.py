"""The examples of docs/architecture.md do what the page says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.scheduler.test_scheduler import make_scheduler, request, run_step

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
    return names


def test_a_policy(examples: dict[str, Any]) -> None:
    scheduler = make_scheduler(max_num_seqs=1, policy=examples["LastComeFirstServed"]())
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
