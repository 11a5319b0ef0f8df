"""`context_shift` over HTTP: an answer ends at the model's window, or goes on behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import BadRequestError, OpenAI

from scheduler.config import DEFAULT_MODEL
from tests.server.serving import Json, Server

WINDOW = 96


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[OpenAI]:
    """Of a server whose sequences have at most `WINDOW` tokens."""
    log = tmp_path_factory.mktemp("windowed") / "log"
    with (
        Server(log, "--max-model-len", str(WINDOW)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
    ):
        yield client


def test_an_answer_goes_on_behind_the_window_where_that_is_wished(client: OpenAI) -> None:
    wish: Json = {
        "model": DEFAULT_MODEL,
        "prompt": "The sea",
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    ended = client.completions.create(**wish, max_tokens=90)
    wish["extra_body"] = {"ignore_eos": True, "context_shift": True}
    whole = client.completions.create(**wish, max_tokens=200)
    assert ended.usage is not None
    assert whole.usage is not None
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("length", 90)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 200)
    assert whole.choices[0].text.startswith(ended.choices[0].text)
    parts = client.completions.create(**wish, max_tokens=200, stream=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text


def test_without_it_no_answer_is_longer_than_the_window(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=DEFAULT_MODEL, prompt="The sea", max_tokens=200)
    assert refused.value.param == "max_tokens"
    assert str(WINDOW) in refused.value.message


def test_it_is_true_or_false(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=DEFAULT_MODEL, prompt="The sea", extra_body={"context_shift": "perhaps"})
    assert refused.value.param == "context_shift"
