"""Clients of the server that most tests share, and a server with users."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from scheduler.text.tokenizer import Tokenizer
from tests.server.serving import Json, Server
from tests.server.users_server import UsersServer

MODEL = "SmolLM2-135M-Instruct"
QWEN = "Qwen2.5-Coder-0.5B-Instruct"
ORIGIN = "https://app.example"


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with server.async_client() as client:
        yield client


@pytest.fixture(scope="session")
def users_server(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[UsersServer]:
    """Eight seats, a short queue, users of each kind, and a log of what they ask."""
    users: dict[str, Json] = {
        "alice": {},
        "bob": {"weight": 2.0, "priority": "high"},
        "carol": {},
        "one-at-a-time": {"limits": {"max_running": 1}},
        "one-a-minute": {"limits": {"requests_per_minute": 1}},
        "twenty-tokens": {"limits": {"requests_per_minute": 100, "tokens_per_minute": 20}},
        "one-and-one": {"limits": {"max_running": 1, "max_queued": 1}},
    }
    queue = ["--max-queued-requests", "16", "--max-queued-tokens", "2000"]
    folder = tmp_path_factory.mktemp("users_server")
    with UsersServer(folder, users, "--max-num-seqs", "8", "--log-prompts", *queue) as server:
        yield server


@pytest.fixture(scope="session")
def qwen_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that was taught to call tools."""
    flags = ["--model", QWEN, "--kv-cache-memory", "128MB", "--quantization", "int8"]  # which need not be measured
    with Server(tmp_path_factory.mktemp("qwen") / "log", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def dressed_server(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    """As behind a proxy, with three names and no other, for pages of one origin, strict with fields that it does
    not know, and keeping responses."""
    folder = tmp_path_factory.mktemp("dressed")
    flags = ["--root-path", "/carousel", "--served-model-name", "fast,slow", "--cors-origins", ORIGIN]
    flags += ["--model-alias", "claude-mine", "--unknown-models", "refuse"]
    flags += ["--unknown-fields", "refuse", "--store", str(folder / "responses.sqlite3")]
    with Server(folder / "log", *flags, "--kv-cache-memory", "64MB") as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer(model_path: str) -> Tokenizer:
    return Tokenizer(model_path)
