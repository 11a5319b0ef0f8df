"""What an answer's steps are told to be: `"explain": true`, and `carousel generate --explain`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import StepPart
from server.api.explanation import Explainer
from tests.server import scripted
from tests.server.conftest import MODEL
from tests.server.serving import Server, carousel

PROMPT = "apple, pear, plum, cherry, apple, pear, plum, cherry, apple, pear,"

Step = dict[str, Any]


def explained(client: OpenAI, prompt: str = PROMPT, **fields: Any) -> tuple[Any, list[Step]]:
    body = {"temperature": 0, "max_tokens": 20, "explain": True} | fields
    choice = client.completions.create(model=MODEL, prompt=prompt, extra_body=body).choices[0]
    return choice, choice.explanation  # type: ignore[attr-defined]


def check_whole(steps: list[Step], prompt: list[int], answer: list[int]) -> None:
    """Every token goes in once, behind those that are in the cache, and comes out once."""
    context = list(prompt)
    for number, step in enumerate(steps, 1):
        assert step["step"] == number
        computed = [token["id"] for token in step["input"]]
        assert computed == context[step["cached"] : step["cached"] + len(computed)]
        given = [token["id"] for token in step["tokens"]]
        assert step["cached"] + len(computed) == len(context) or not given
        assert len(given) <= step["kept"] + 1
        assert [token["id"] for token in step["drafted"]][: step["kept"]] == given[: step["kept"]]
        context += given
    assert context == [*prompt, *answer]


def test_the_steps_make_the_answer(client: OpenAI, tokenizer: Tokenizer) -> None:
    plain = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=20, extra_body={"return_token_ids": True}
    ).choices[0]
    choice, steps = explained(client)
    assert choice.text == plain.text
    assert choice.logprobs is None
    check_whole(steps, tokenizer.encode(PROMPT), plain.token_ids)  # type: ignore[attr-defined]
    for token in (token for step in steps for token in step["tokens"]):
        assert token["how"] == "greedy"
        assert len(token["likeliest"]) == 5
        assert token["likeliest"][0]["id"] == token["id"]
        assert token["probability"] == pytest.approx(token["chosen_with"], rel=1e-3)
    assert "".join(token["text"] for step in steps for token in step["tokens"]) == plain.text


@pytest.mark.parametrize(
    "narrowed", [{}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.02}, {"frequency_penalty": 0.5}]
)
def test_a_drawn_number_falls_on_the_part_of_its_token(client: OpenAI, narrowed: dict[str, Any]) -> None:
    _, steps = explained(client, temperature=0.8, seed=5, max_tokens=40, **narrowed)
    tokens = [token for step in steps for token in step["tokens"]]
    assert len(tokens) > 5
    for token in tokens:
        low, high = token["part"]
        assert token["how"] == "drawn"
        assert low - 1e-5 <= token["number"] <= high + 1e-5
        assert high - low == pytest.approx(token["chosen_with"])
        assert 1 <= token["candidates"] <= narrowed.get("top_k", 49152)


def test_a_chat_is_explained_as_it_is_streamed(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"explain": True, "temperature": 0, "max_tokens": 8}
    whole: Any = client.chat.completions.create(model=MODEL, messages=messages, extra_body=body).choices[0]
    stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True, extra_body=body)
    steps = [step for chunk in stream for step in getattr(chunk.choices[0], "explanation", [])]
    assert whole.logprobs is None
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    found = [[token["id"] for token in step["tokens"]] for step in whole.explanation]
    assert sum(map(len, found)) == 8
    assert [token for step in steps for token in step["tokens"]] == [
        token for step in whole.explanation for token in step["tokens"]
    ]
    assert steps[0]["cached"] > 0, "the first answer left the prompt in the cache"


def test_beams_are_not_explained(client: OpenAI) -> None:
    with pytest.raises(Exception, match="not explained"):
        explained(client, use_beam_search=True, n=2)


@pytest.mark.parametrize("temperature", [0.0, 1.1e-5, 1.0, 100.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0, "frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"logit_bias": {"28": 100.0, "284": -100.0}, "repetition_penalty": 0.01, "frequency_penalty": 2.0},
        {"top_p": 0.5, "top_k": 40, "min_p": 0.1, "repetition_penalty": 0.01},
        {"top_p": 1e-9, "repetition_penalty": 100.0},
        {"min_p": 1.0},
    ],
)
async def test_at_the_ends_of_what_may_be_asked(
    server: Server, fields: dict[str, Any], temperature: float
) -> None:
    asks = {"prompt": PROMPT, "max_tokens": 6, "explain": True, "ignore_eos": True, "temperature": temperature}
    status, answer = await server.post("/v1/completions", asks | fields)
    assert status == 200, answer
    tokens = [token for step in answer["choices"][0]["explanation"] for token in step["tokens"]]
    assert len(tokens) == 6
    assert all(0 <= token["chosen_with"] <= 1 + 1e-6 for token in tokens)


@pytest.mark.prove
def test_on_the_terminal(tokenizer: Tokenizer) -> None:
    flags = ["--explain", "--raw", "--dtype", "float32", "--max-tokens", "12"]
    run = carousel("generate", PROMPT, *flags)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    count = len(tokenizer.encode(PROMPT))
    assert lines[0].startswith(f"step 1   nothing in the cache, {count} go in: "), lines[0]
    assert any("was guessed, and it is right" in line for line in lines)
    assert sum("the likeliest (greedy)" in line for line in lines) == 12
    assert lines[-1].startswith("It ended with length: ")
    run = carousel("generate", PROMPT, *flags, "--json")
    *steps, ending = map(json.loads, run.stdout.splitlines())
    assert ending["finish_reason"] == "length"
    assert lines[-1] == f"It ended with length: {ending['answer']}"
    check_whole(steps, tokenizer.encode(PROMPT), [token["id"] for step in steps for token in step["tokens"]])


def test_a_step_looks_at_its_own_tokens_only(tokenizer: Tokenizer) -> None:
    """However long the answer: of the prompt nothing is read but what a step computed."""

    class Counted(list[int]):
        num_read = 0

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            self.num_read += len(found) if isinstance(place, slice) else 1
            return found

        def __iter__(self) -> Iterator[int]:
            self.num_read += len(self)
            return super().__iter__()

    prompt = Counted(range(100, 600))
    explainer = Explainer(tokenizer, prompt)
    parts = [(0, 500), *((500 + number, 1) for number in range(100))]
    for start, length in parts:
        explainer.take(scripted.token("", part=StepPart(start, length, 0, 1, 0.01)))
    steps = explainer.pop()
    assert isinstance(steps, list)
    assert [token.id for step in steps for token in step.input] == [*range(100, 600), *[7] * 100]
    assert prompt.num_read == 500


def test_what_made_room_for_more(tokenizer: Tokenizer) -> None:
    """A window of 64 tokens, and an answer of 100."""
    flags = ["--explain", "--json", "--raw", "--max-tokens", "100", "--max-model-len", "64", "--context-shift"]
    run = carousel("generate", PROMPT, *flags, "--speculative", "off")
    assert run.returncode == 0, run.stderr
    *steps, ending = map(json.loads, run.stdout.splitlines())
    assert len(steps) == 100
    count = len(tokenizer.encode(PROMPT))
    assert [step["dropped"] for step in steps if step["step"] > 1] == [
        max(0, position // 16 - 3) * 16 for position in range(count, count + 99)
    ]
    assert max(step["cached"] for step in steps) == 63
    assert ending["finish_reason"] == "length"


def test_json_needs_steps() -> None:
    run = carousel("generate", "Hello", "--json")
    assert run.returncode == 2
    assert run.stderr == "carousel generate: --json is for --explain only\n"
