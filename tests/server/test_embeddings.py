"""/v1/embeddings through the openai SDK; what is right comes from transformers, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, PreTrainedModel

from scheduler.text.tokenizer import Tokenizer
from tests.server.conftest import MODEL
from tests.server.serving import Server, carousel
from tests.server.test_batch_command import read, write

TEXTS = [
    "Alice was beginning to get very tired",
    "A cat",
    "Down, down, down. Would the fall never end?",
]


@pytest.fixture(scope="module")
def model(float32_path: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(float32_path, dtype="float32")
    return model


def states(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.base_model(torch.tensor([token_ids])).last_hidden_state[0]
        return found


def embed(client: OpenAI, texts: Any, **fields: Any) -> torch.Tensor:
    answer = client.embeddings.create(model=MODEL, input=texts, extra_body=fields)  # the SDK asks for base64
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return torch.tensor([each.embedding for each in answer.data])


def test_the_mean_of_all_tokens_and_the_last_token(
    client: OpenAI, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    tokens = [tokenizer.encode(text) for text in TEXTS]
    means = torch.stack([states(model, each).mean(dim=0) for each in tokens])
    last = torch.stack([states(model, each)[-1] for each in tokens])
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(embed(client, TEXTS), normal(means), atol=1e-4, rtol=0)
    torch.testing.assert_close(embed(client, tokens, pooling="mean"), normal(means), atol=1e-4, rtol=0)
    torch.testing.assert_close(embed(client, TEXTS, pooling="last"), normal(last), atol=1e-4, rtol=0)
    raw = embed(client, TEXTS, pooling="last", normalize=False)
    torch.testing.assert_close(raw, last, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(normal(raw), raw)


def test_as_numbers_with_usage(client: OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float", dimensions=576)
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(tokenizer.encode(TEXTS[0]))
    assert torch.equal(torch.tensor([answer.data[0].embedding]), embed(client, TEXTS[0]))


def test_prompts_are_truncated_where_that_is_asked_for(client: OpenAI, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXTS[2])
    assert torch.equal(embed(client, TEXTS[2], truncate_prompt_tokens=4), embed(client, [tokens[-4:]]))
    right = embed(client, TEXTS[2], truncate_prompt_tokens=4, truncation_side="right")
    assert torch.equal(right, embed(client, [tokens[:4]]))


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({}, "input", "is required"),
        ({"input": []}, "input", "is empty"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": 5}, "input", "a string, a list of strings"),
        ({"input": [10**6]}, "input", "outside of"),
        ({"input": "Alice " * 9000}, "input", "maximum context length|shorten"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "a", "dimensions": 64}, "dimensions", "have 576 dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "pooling": "cls"}, "pooling", "mean"),
        ({"input": "a", "dimension": 5}, "dimension", "did you mean dimensions"),
    ],
)
def test_what_is_wrong_is_told(client: OpenAI, body: dict[str, Any], param: str, part: str) -> None:
    with pytest.raises(openai.APIStatusError, match=part) as refused:
        client.post("/embeddings", body=body, cast_to=object)
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param


def test_in_a_batch(server: Server, client: OpenAI, tmp_path: Path) -> None:
    lines: list[Any] = [
        {"custom_id": text, "method": "POST", "url": "/v1/embeddings", "body": {"input": text}} for text in TEXTS
    ]
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    result = carousel("batch", str(source), str(output), "--url", server.url)
    assert result.returncode == 0, result.stderr
    answers = {answer["custom_id"]: answer["response"]["body"] for answer in read(output)}
    found = torch.tensor([answers[text]["data"][0]["embedding"] for text in TEXTS])
    assert torch.equal(found, embed(client, TEXTS)), json.dumps(answers)[:500]
