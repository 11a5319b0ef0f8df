"""Beam search through the openai SDK: the answers that transformers' generate finds, in float32."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, PreTrainedModel

from scheduler.client.beam_search import BeamOptions, BeamSearch
from scheduler.text.tokenizer import Tokenizer
from tests.server.conftest import MODEL

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank, and"
FULL_STOP = "."
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def model(float32_path: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(float32_path, dtype="float32")
    return model


@pytest.mark.parametrize(
    ("ends", "length_penalty"),
    [(True, 0.0), (True, 1.0), (False, 1.0)],
    ids=["short", "sentences", "of-full-length"],
)
def test_the_beams_are_those_of_transformers(
    client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer, length_penalty: float, ends: bool
) -> None:
    (stop,) = tokenizer.encode(FULL_STOP)
    ids = tokenizer.encode(PROMPT)
    fields: dict[str, Any] = {"stop_token_ids": [stop]} if ends else {}
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        n=3,
        max_tokens=NUM_TOKENS,
        extra_body={
            "use_beam_search": True,
            "length_penalty": length_penalty,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        },
    )
    found = [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]
    with torch.inference_mode():
        expected = model.generate(  # type: ignore[operator]
            torch.tensor([ids]),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            length_penalty=length_penalty,
            early_stopping=False,
            repetition_penalty=1.0,
            eos_token_id=stop if ends else tokenizer.vocab_size,
            pad_token_id=0,
        )[:, len(ids) :]
    assert found == [[token for token in row if token != 0] for row in expected.tolist()]
    assert [choice.text for choice in answer.choices] == [
        tokenizer.decode(tokens[:-1] if tokens[-1] == stop else tokens) for tokens in found
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(map(len, found))


def test_the_context_of_beams_is_not_shifted(client: OpenAI) -> None:
    search: dict[str, Any] = {"use_beam_search": True, "context_shift": True}
    with pytest.raises(openai.BadRequestError, match="context_shift does not go with use_beam_search") as refused:
        client.completions.create(model=MODEL, prompt=PROMPT, n=2, max_tokens=4, extra_body=search)
    assert refused.value.param == "context_shift"


def test_the_best_of_more_beams_and_in_a_chat(client: OpenAI) -> None:
    search: dict[str, Any] = {"use_beam_search": True}
    three = client.completions.create(model=MODEL, prompt=PROMPT, n=3, max_tokens=6, extra_body=search)
    best = client.completions.create(model=MODEL, prompt=PROMPT, best_of=3, max_tokens=6, extra_body=search)
    assert [choice.text for choice in best.choices] == [three.choices[0].text]
    said = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Name a colour."}], n=2, max_tokens=5, extra_body=search
    )
    assert len({choice.message.content for choice in said.choices}) == 2


def test_all_that_may_follow_ends_the_answer(client: OpenAI) -> None:
    asks: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    create: Any = client.completions.create
    likely = create(**asks, logprobs=20, extra_body={"return_tokens_as_token_ids": True})
    ends = [int(name.removeprefix("token_id:")) for name in likely.choices[0].logprobs.top_logprobs[0]]
    search = {"use_beam_search": True, "stop_token_ids": ends}
    answer = create(**(asks | {"max_tokens": 9}), n=3, extra_body=search)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    assert {choice.stop_reason for choice in answer.choices} == set(ends[:3])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_beams_that_all_end_are_as_many_as_are_wanted(width: int) -> None:
    search = BeamSearch(width, 9, frozenset({7, 8}), BeamOptions())
    search.advance([[(5, -0.5), (7, -1.0), (8, -2.0)]])
    while not search.is_done:
        search.advance([[(7, -0.1), (8, -0.2)] for _ in search.live])
    assert len(search.best) == width
    assert all(beam.has_ended for beam in search.best)
