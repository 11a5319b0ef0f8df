"""What the engine's tests share."""

from __future__ import annotations

import pytest

from scheduler.core.seating import Seating
from scheduler.features.audit import violations
from scheduler.process import engine_core as core
from tests.scheduler.test_families import tiny_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of random weights, with a vocabulary of a few hundred."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def _accounts_add_up_at_every_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test they are not repaired, but a failure; unless it is about that."""
    monkeypatch.setattr(core, "CHECK_EVERY", 1)
    if request.node.get_closest_marker("breaks_accounts") is not None:
        return

    def none(seating: Seating) -> list[str]:
        found = violations(seating)
        assert not found
        return found

    monkeypatch.setattr(core, "violations", none)
