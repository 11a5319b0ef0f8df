"""What the engine's tests share."""

from __future__ import annotations

import pytest

from tests.scheduler.test_families import tiny_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of random weights, with a vocabulary of a few hundred."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(path)
    return str(path)
