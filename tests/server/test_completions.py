"""/v1/completions, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI, OpenAI

from scheduler.text.tokenizer import Tokenizer
from tests.server.conftest import MODEL

PROMPT = "The capital of France is"


def test_an_answer_in_one_piece(client: OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_says_the_same_token_by_token(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8)
    chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 7 + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


async def test_the_async_client_streams_too(async_client: AsyncOpenAI) -> None:
    whole = await async_client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8)
    stream = await async_client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, stream=True
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


def test_a_stream_ends_with_usage_if_asked(client: OpenAI, tokenizer: Tokenizer) -> None:
    *chunks, last = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert last.usage.completion_tokens == 3


def test_sixteen_tokens_unless_told_otherwise(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_two_prompts_in_one_request(client: OpenAI) -> None:
    prompts = [PROMPT, "The capital of Italy is"]
    together = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=4)
    assert [choice.index for choice in together.choices] == [0, 1]
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=4)
        assert choice.text == alone.choices[0].text


def test_a_prompt_may_be_tokens(client: OpenAI, tokenizer: Tokenizer) -> None:
    as_text = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4)
    tokens = tokenizer.encode(PROMPT)
    as_tokens = client.completions.create(model=MODEL, prompt=tokens, temperature=0, max_tokens=4)
    twice = client.completions.create(model=MODEL, prompt=[tokens, tokens], temperature=0, max_tokens=4)
    assert {choice.text for choice in [*as_tokens.choices, *twice.choices]} == {as_text.choices[0].text}


def test_several_samples_of_several_prompts(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=["One", "Two"], n=3, max_tokens=4, seed=1, stream=True, echo=True
    )
    texts = [""] * 6
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [text[:3] for text in texts] == ["One"] * 3 + ["Two"] * 3
    assert len(set(texts)) == 6, "samples of one prompt differ"


def test_echo_puts_the_prompt_first(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=2, echo=True)
    assert answer.choices[0].text.startswith(PROMPT + " Paris")


def test_a_seed_repeats_the_draw(client: OpenAI) -> None:
    def draw(seed: int) -> str:
        return (
            client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=12, seed=seed)
            .choices[0]
            .text
        )

    assert draw(7) == draw(7) != draw(8)


def test_logprobs_tell_the_alternatives(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=3)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, logprob, top, offset in zip(
        choice.logprobs.tokens,
        choice.logprobs.token_logprobs,
        choice.logprobs.top_logprobs,
        choice.logprobs.text_offset,
        strict=True,
    ):
        assert len(top) == 3
        assert max(top, key=lambda text: top[text]) == token, "greedy takes the likeliest"
        assert top[token] == logprob <= 0
        assert choice.text[offset:].startswith(token)


def test_a_stop_string_may_begin_and_end_within_tokens(client: OpenAI) -> None:
    create = client.completions.create
    prompt = "Once upon a time"
    text = create(model=MODEL, prompt=prompt, temperature=0, max_tokens=16).choices[0].text
    stop = text[8:15]
    whole = create(model=MODEL, prompt=prompt, temperature=0, max_tokens=16, stop=[stop, "never"])
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(create(model=MODEL, prompt=prompt, temperature=0, max_tokens=16, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_characters_of_several_tokens_arrive_whole(client: OpenAI) -> None:
    prompt = "🎠🎡🎢🎠🎡🎢🎠🎡🎢🎠🎡🎢🎠"
    chunks = list(client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True))
    pieces = [chunk.choices[0].text for chunk in chunks]
    whole = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24)
    assert "".join(pieces) == whole.choices[0].text
    assert whole.choices[0].text.startswith("🎡🎡")
    assert not any("\ufffd" in piece for piece in pieces[:-1]), "only the last may end within a character"


async def test_sixty_four_at_once(async_client: AsyncOpenAI) -> None:
    async def tell(place: int) -> str:
        stream = await async_client.completions.create(
            model=MODEL, prompt=f"At {place} o'clock", temperature=0, max_tokens=8, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    together = await asyncio.gather(*(tell(place) for place in range(64)))
    assert all(together)
    assert together[:3] == [await tell(place) for place in range(3)], "company changes no answer"
