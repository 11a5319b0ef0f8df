"""What is one queue for all is shared by user: who sends little does not wait for all that another has sent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from tests.server.serving import Json
from tests.server.users_server import COMPLETIONS, Answer, UsersServer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[UsersServer]:
    with UsersServer(tmp_path_factory.mktemp("shared"), {"alice": {}, "bob": {}}) as server:
        yield server


def schema(number: int, properties: int) -> Json:
    fields = {f"field{number}_{place}": {"type": "string", "maxLength": 40} for place in range(properties)}
    return {"type": "object", "properties": fields, "additionalProperties": False}


async def num_left_when(one: Coroutine[Any, Any, Answer], flood: list[Coroutine[Any, Any, Answer]]) -> int:
    """How many of a flood that was sent before are not answered when one more is."""
    tasks = [asyncio.create_task(each) for each in flood]
    await asyncio.sleep(0.5)
    assert not all(task.done() for task in tasks), "a flood takes longer than that"
    answer = await one
    assert answer.status == 200
    left = sum(not task.done() for task in tasks)
    await asyncio.gather(*tasks)
    return left


async def test_a_first_schema_does_not_wait_for_somebody_elses_forty(shared: UsersServer) -> None:
    def asked(name: str, schema: Json) -> Coroutine[Any, Any, Answer]:
        return shared.ask(name, {"prompt": "a", "max_tokens": 1, "guided_json": schema})

    flood = [asked("alice", schema(number, 900)) for number in range(40)]
    assert await num_left_when(asked("bob", schema(99, 2)), flood) > 20


async def test_a_text_is_not_tokenized_after_all_of_somebody_elses(shared: UsersServer) -> None:
    def asked(name: str, text: str) -> Coroutine[Any, Any, Answer]:
        return shared.send("POST", "/tokenize", shared.authorization(name), json={"prompt": text})

    flood = [asked("alice", "the sun " * 8000) for _ in range(150)]
    assert await num_left_when(asked("bob", "the moon " * 1200), flood) > 50


async def test_a_grammar_is_not_compiled_after_all_of_somebody_elses(shared: UsersServer) -> None:
    """They have passed the check by then; what is compiled for the answers is another queue."""

    def asked(name: str, number: int) -> Coroutine[Any, Any, Answer]:
        body = {"prompt": "a", "max_tokens": 1, "guided_regex": f"({number}|[a-f]{{200}}x){{20}}"}
        return shared.send("POST", COMPLETIONS, shared.authorization(name), json=body)

    flood = [asked("alice", number) for number in range(60)]
    assert await num_left_when(asked("bob", 99), flood) > 20
