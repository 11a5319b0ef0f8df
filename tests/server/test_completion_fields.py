"""What each field of /v1/completions does to the answer; what is right comes from transformers, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from scheduler.text.tokenizer import Tokenizer
from tests.server.conftest import MODEL

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank"
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(float32_path: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(float32_path, dtype="float32")
    return model


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(PROMPT)


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Completion:
    known = {name: fields.pop(name) for name in ("n", "best_of", "echo", "logprobs", "stream") if name in fields}
    body = {"temperature": 0, "max_tokens": NUM_TOKENS} | fields
    answer: Completion = client.completions.create(model=MODEL, prompt=prompt, extra_body=body, **known)
    return answer


def text_of(client: OpenAI, **fields: Any) -> str:
    return complete(client, **fields).choices[0].text


class Penalties(LogitsProcessor):
    """OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""

    def __init__(self, start: int, frequency: float, presence: float) -> None:
        self._start, self._frequency, self._presence = start, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self._start :], minlength=scores.shape[1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


def test_penalties_biases_and_bad_words_give_what_transformers_generates(
    client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer, ids: list[int]
) -> None:
    plain = tokenizer.decode(complete(client, return_token_ids=True).choices[0].token_ids)  # type: ignore[attr-defined]
    unwanted = plain.split()[1]
    cases: list[tuple[dict[str, Any], LogitsProcessor]] = [
        ({"repetition_penalty": 1.5}, RepetitionPenaltyLogitsProcessor(1.5)),
        ({"frequency_penalty": -2, "presence_penalty": -2}, Penalties(len(ids), -2, -2)),
        ({"logit_bias": {"260": -100, "198": 9}}, SequenceBiasLogitsProcessor([[[260], -100.0], [[198], 9.0]])),
        (
            {"bad_words": [unwanted]},
            NoBadWordsLogitsProcessor([list(phrase) for phrase in tokenizer.phrases([unwanted])]),
        ),
    ]
    for fields, processor in cases:
        expected = model.generate(  # type: ignore[operator]
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )[0, len(ids) :]
        found = text_of(client, **fields)
        assert found == tokenizer.decode(expected.tolist()), fields
        assert found != plain, f"{fields} change something"


def logprobs_of(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), dim=-1)


def test_an_echoed_prompt_has_the_logprobs_that_transformers_computes(
    client: OpenAI, model: PreTrainedModel, ids: list[int]
) -> None:
    """As lm-eval asks for them."""
    expected = logprobs_of(model, ids)
    for fields in ({"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 1, "n": 2, "stream": True}):
        answer = complete(client, prompt=[ids], echo=True, logprobs=2, **fields)
        chunks: Any = answer if "stream" in fields else [answer]
        choices = [
            choice for chunk in chunks for choice in chunk.choices if choice.index == fields.get("n", 1) - 1
        ]
        logprobs = choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.text_offset is not None
        assert choices[0].text.startswith(PROMPT)
        assert len(logprobs.tokens) == len(ids) + fields["max_tokens"]
        assert logprobs.token_logprobs[0] is None
        of_prompt = torch.tensor(logprobs.token_logprobs[1 : len(ids)])
        rows = torch.arange(len(ids) - 1)
        torch.testing.assert_close(of_prompt, expected[rows, ids[1:]], atol=1e-3, rtol=0)
        for row, top in enumerate(logprobs.top_logprobs[1 : len(ids)]):
            assert max(top.values()) == pytest.approx(expected[row].max().item(), abs=1e-3)
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert choices[0].text[offset:].startswith(token)


def test_prompt_logprobs_by_token(client: OpenAI, model: PreTrainedModel, ids: list[int]) -> None:
    long = ids * 20  # longer than a step's chunk
    expected = logprobs_of(model, long)
    for _ in range(2):  # the second time its blocks are in the prefix cache
        first, *others = complete(client, prompt=long, prompt_logprobs=1).choices[0].prompt_logprobs  # type: ignore[attr-defined]
        assert first is None
        assert len(others) == len(long) - 1
        for row, (token, entry) in enumerate(zip(long[1:], others, strict=True)):
            found = entry[str(token)]
            assert found["logprob"] == pytest.approx(expected[row, token].item(), abs=1e-3)
            better = int((expected[row] > expected[row, token] + 1e-3).sum())
            assert better < found["rank"] <= 1 + int((expected[row] > expected[row, token] - 1e-3).sum())
    assert complete(client).choices[0].prompt_logprobs is None  # type: ignore[attr-defined]


def test_the_best_of_several(client: OpenAI) -> None:
    drawn = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    every = complete(client, n=5, logprobs=0, **drawn).choices

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs))

    best = sorted(every, key=mean, reverse=True)
    answer = complete(client, n=2, best_of=5, **drawn)
    assert [choice.text for choice in answer.choices] == [choice.text for choice in best[:2]]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30, "all five were computed"


def test_only_these_tokens(client: OpenAI, tokenizer: Tokenizer) -> None:
    allowed = [tokenizer.encode(digit)[0] for digit in "0123456789"]
    for temperature in (0, 1):
        assert text_of(client, allowed_token_ids=allowed, temperature=temperature).isdecimal()


def test_no_end_before_min_tokens(client: OpenAI) -> None:
    """transformers' min_new_tokens: the end cannot be drawn, so the model does not speak beyond it."""
    question = "<|im_start|>user\nSay only: OK<|im_end|>\n<|im_start|>assistant\n"
    short = complete(client, prompt=question, max_tokens=30)
    assert short.usage is not None
    assert short.usage.completion_tokens < 20
    long = complete(client, prompt=question, max_tokens=30, min_tokens=20, skip_special_tokens=False)
    assert long.usage is not None
    assert long.usage.completion_tokens >= 20
    assert "<|im_end|>" not in long.choices[0].text


def test_special_tokens_show_if_asked(client: OpenAI) -> None:
    prompt = "<|im_start|>user\nSay only: OK<|im_end|>\n<|im_start|>assistant\n"
    fields = {"prompt": prompt, "ignore_eos": True, "max_tokens": 16}
    hidden, shown = (text_of(client, **fields, skip_special_tokens=skip) for skip in (True, False))
    assert "<|im_end|>" in shown
    assert "<|im_end|>" not in hidden
    assert text_of(client, **fields, skip_special_tokens=False, spaces_between_special_tokens=False) == shown
    ended = {"prompt": prompt, "skip_special_tokens": False}
    assert not text_of(client, **ended).endswith("<|im_end|>")
    assert text_of(client, **ended, include_stop_str_in_output=True).endswith("<|im_end|>")


def test_the_stop_string_is_part_of_the_answer_if_asked(client: OpenAI) -> None:
    text = text_of(client)
    stop = text[6:12]
    assert text_of(client, stop=stop) == text[: text.index(stop)]
    with_it = complete(client, stop=stop, include_stop_str_in_output=True).choices[0]
    assert with_it.text == text[: text.index(stop) + len(stop)]
    assert with_it.stop_reason == stop  # type: ignore[attr-defined]


def test_a_stop_token_is_no_part_of_the_answer(client: OpenAI) -> None:
    tokens = complete(client, return_token_ids=True).choices[0].token_ids  # type: ignore[attr-defined]
    whole, choice = text_of(client), complete(client, stop_token_ids=[tokens[4]]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == tokens[4]  # type: ignore[attr-defined]
    assert len(choice.text) < len(whole)
    assert whole.startswith(choice.text)


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-5, None)), ("right", slice(0, 5))])
def test_a_prompt_is_cut_at_the_side_that_was_said(client: OpenAI, ids: list[int], side: str, kept: slice) -> None:
    cut = complete(client, truncate_prompt_tokens=5, truncation_side=side, return_token_ids=True)
    assert cut.usage is not None
    assert cut.usage.prompt_tokens == 5
    assert cut.choices[0].prompt_token_ids == ids[kept]  # type: ignore[attr-defined]
    assert cut.choices[0].text == text_of(client, prompt=ids[kept])


def test_a_prompt_may_be_cut_to_what_fits(client: OpenAI) -> None:
    ended = {"2": 100}
    answer = complete(client, prompt="word " * 9000, truncate_prompt_tokens=-1, max_tokens=8190, logit_bias=ended)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2, "and leaves room for the answer"


def test_tokens_may_be_told_by_number(client: OpenAI, tokenizer: Tokenizer) -> None:
    answer = complete(client, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True).choices[0]
    assert answer.logprobs is not None
    assert answer.logprobs.tokens == [f"token_id:{token}" for token in answer.token_ids]  # type: ignore[attr-defined]
    assert tokenizer.decode(answer.token_ids) == answer.text  # type: ignore[attr-defined]


def test_usage_with_every_event_if_asked(client: OpenAI) -> None:
    """As guidellm asks for it."""
    chunks = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=4,
        stream=True,
        extra_body={
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    )
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("fields", [{"temperature": 1e-39}, {"temperature": 1, "top_p": 0}])
def test_the_ends_of_the_scales_are_the_likeliest_token(client: OpenAI, fields: dict[str, Any]) -> None:
    assert text_of(client, **fields, seed=3) == text_of(client)


def test_parts_of_characters_in_logprobs(client: OpenAI) -> None:
    prompt = "🎠🎡🎢🎠🎡🎢🎠🎡🎢🎠🎡🎢🎠"
    choice = complete(client, prompt=prompt, logprobs=5, max_tokens=9).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.tokens is not None
    assert {len(top) for top in logprobs.top_logprobs} <= {5, 6}, "no two of one name"
    assert "bytes:\\xf0\\x9f" in " ".join(logprobs.tokens)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert max(logprobs.text_offset) < len(choice.text)


def test_special_tokens_around_a_prompt_are_the_tokenizers(client: OpenAI) -> None:
    """The default model's tokenizer puts none; asking for them or not is the same there."""
    with_them, without = (
        complete(client, add_special_tokens=special, return_token_ids=True).choices[0].prompt_token_ids  # type: ignore[attr-defined]
        for special in (True, False)
    )
    assert with_them == without
