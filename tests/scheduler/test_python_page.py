"""The page on the Python API: its examples run as they stand, and what it says of importing is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import carousel
from carousel import LLM, AsyncLLM, InvalidRequestError, SamplingParams
from scheduler.config import EngineConfig
from scheduler.knobs import Knobs

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_examples_run(model_path: str) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
    assert "{'name': '" in done.stdout


def test_importing_it_loads_nothing_and_changes_nothing() -> None:
    program = (
        "import os, sys; before = dict(os.environ); import carousel; assert dict(os.environ) == before; "
        "assert not {'torch', 'numpy', 'msgspec', 'pydantic', 'scheduler'} & {*sys.modules}; "
        "carousel.SamplingParams; assert 'torch' not in sys.modules; print(*dir(carousel))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(carousel.__all__)
    assert all(getattr(carousel, name).__name__ == name for name in carousel.__all__)


def test_the_knobs_are_those_of_the_config() -> None:
    typed, fields = get_type_hints(Knobs), EngineConfig.model_fields
    assert typed.keys() == fields.keys() - {"model"}
    for name, kind in typed.items():
        if get_origin(kind) is Literal:
            assert get_args(kind) == get_args(fields[name].annotation), name


@pytest.fixture(scope="module")
def llm(model_path: str) -> LLM:
    return LLM(model_path, dtype="float32")


def test_conversations_are_answered_together(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8)
    asked = [[{"role": "user", "content": f"What is {number} and 1?"}] for number in range(3)]
    together = llm.chat(asked, greedy, progress=False)
    assert [result.text for result in together] == [llm.chat(one, greedy, progress=False)[0].text for one in asked]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    (told,) = llm.chat(asked[0], greedy, tools=[tool], progress=False)
    assert len(told.prompt_token_ids) >= len(together[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("messages", "form", "message"),
    [
        ([{"role": "user"}], None, "a role and a content"),
        ([{"role": "user", "content": "a"}], {"type": "yaml"}, "response_format should be"),
    ],
)
def test_what_is_no_conversation_is_refused(
    llm: LLM, messages: list[dict[str, str]], form: object, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(messages, response_format=form, progress=False)  # type: ignore[arg-type]
    assert not llm.engine.has_work


async def test_both_say_the_same(llm: LLM, model_path: str) -> None:
    text = "Once upon a time there was a river."
    async with AsyncLLM(model_path, dtype="float32", kv_cache_memory="64MB") as other:
        entries = await other.score(text, alternatives=1)
        vector = await other.embed(text)
        with pytest.raises(InvalidRequestError, match="the prompt is empty"):
            await other.score([])
    assert [entries] == llm.score([text], alternatives=1, progress=False)
    assert len(entries) == len(llm.tokenizer.encode(text)) - 1
    assert all(len(entry.top) == 1 for entry in entries)
    np.testing.assert_array_equal(vector, llm.embed([text], progress=False)[0])


def test_it_is_closed_behind_a_block(model_path: str) -> None:
    with LLM(model_path, dtype="float32", kv_cache_memory="16MB") as llm:
        assert llm.generate(["a"], SamplingParams(max_tokens=1), progress=False)
    assert not hasattr(llm, "engine")
