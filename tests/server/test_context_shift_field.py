"""`context_shift` over HTTP: an answer ends at the model's window, or goes on behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI

from scheduler.config import DEFAULT_MODEL
from tests.server.serving import Json, Server

WINDOW = 96


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    """Its sequences have at most `WINDOW` tokens."""
    with Server(tmp_path_factory.mktemp("windowed") / "log", "--max-model-len", str(WINDOW)) as server:
        yield server


@pytest.fixture(scope="module")
def client(windowed: Server) -> Iterator[OpenAI]:
    with windowed.client() as client:
        yield client


@pytest.fixture(scope="module")
def claude(windowed: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=windowed.url, api_key="-", max_retries=0) as client:
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
    whole = client.completions.create(
        model=DEFAULT_MODEL, prompt="The sea", max_tokens=32_000, temperature=0, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    assert (whole.choices[0].finish_reason, whole.usage.total_tokens) == ("length", WINDOW)
    with pytest.raises(BadRequestError, match="shorten it") as refused:
        client.completions.create(model=DEFAULT_MODEL, prompt=[5] * WINDOW, max_tokens=32_000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    last = client.completions.create(model=DEFAULT_MODEL, prompt=[5] * (WINDOW - 1), max_tokens=32_000)
    assert last.usage is not None
    assert last.usage.completion_tokens == 1


def test_what_the_windows_end_is_called_in_other_apis(client: OpenAI, claude: Anthropic) -> None:
    asked: Any = [{"role": "user", "content": "Tell me a story that has no end, of the sea and its ships."}]
    fields: Json = {"model": DEFAULT_MODEL, "messages": asked, "extra_body": {"temperature": 0}}
    with claude.messages.stream(max_tokens=20_000, **fields) as stream:
        streamed = stream.get_final_message()
    for message in (streamed, claude.messages.create(max_tokens=20_000, **fields)):
        assert message.stop_reason == "model_context_window_exceeded"
        usage = message.usage
        assert (usage.cache_read_input_tokens or 0) + usage.input_tokens + usage.output_tokens == WINDOW
    assert claude.messages.create(max_tokens=5, **fields).stop_reason == "max_tokens"
    response = client.responses.create(
        model=DEFAULT_MODEL, input=asked[0]["content"], max_output_tokens=20_000, temperature=0
    )
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    long = asked[0]["content"] * 20
    with pytest.raises(anthropic.BadRequestError, match=rf"prompt is too long: \d+ tokens > {WINDOW - 1} maximum"):
        claude.messages.create(max_tokens=5, **fields | {"messages": [{"role": "user", "content": long}]})


def test_the_smallest_answer_that_is_wanted_has_to_fit(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="min_tokens") as refused:
        client.completions.create(
            model=DEFAULT_MODEL, prompt="The sea", max_tokens=200, extra_body={"min_tokens": 150}
        )
    assert refused.value.param == "min_tokens"


def test_it_is_true_or_false(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=DEFAULT_MODEL, prompt="The sea", extra_body={"context_shift": "perhaps"})
    assert refused.value.param == "context_shift"
