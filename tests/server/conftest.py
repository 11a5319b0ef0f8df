"""One server for most tests, and its clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from scheduler.tokenizer import Tokenizer
from tests.server.serving import Server

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    """The default model in float32, shared by all tests that leave it alive."""
    with Server(tmp_path_factory.mktemp("server") / "log", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with server.async_client() as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)
