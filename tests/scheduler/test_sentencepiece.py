"""Tokenizers that leave out the space with which a text begins, and tokens that take the space that follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.models.checks.quantization import TEXT
from scheduler.text.detokenizer import REPLACEMENT, IncrementalDetokenizer
from scheduler.text.tokenizer import Tokenizer
from tests.scheduler.sentencepiece_like import write_tokenizer

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


CHARACTERS = st.one_of(st.sampled_from("ab \n\u2581é語👍"), st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(str(folder))


def answer(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], step: int) -> str:
    """The text of an answer whose tokens come `step` at a time."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt=prompt)
    pieces = [tokens[start : start + step] for start in range(0, len(tokens), step)]
    return "".join(detokenizer.push(piece, last=number == len(pieces) - 1) for number, piece in enumerate(pieces))


def test_an_answer_is_not_where_a_text_begins(tokenizer: Tokenizer) -> None:
    prompt, tokens = tokenizer.encode("the sky"), tokenizer.encode("cat cat")
    assert tokenizer.decode(tokens) == "cat cat"
    for step in (1, len(tokens)):
        assert answer(tokenizer, prompt, tokens, step) == " cat cat"
    assert answer(tokenizer, [], tokens, 1) == "cat cat"


@given(
    text=st.text(CHARACTERS, min_size=2, max_size=30),
    cut=st.floats(0, 1),
    step=st.integers(1, 40),
)
@settings(max_examples=1000, deadline=None)
@example(text="\x80\x800 0\u0800", cut=0.625, step=1)
def test_prompt_and_answer_are_the_text_of_both(tokenizer: Tokenizer, text: str, cut: float, step: int) -> None:
    tokens = tokenizer.encode(text)
    place = int(cut * (len(tokens) - 1))
    prompt = tokenizer.decode(tokens[:place])
    if place == len(tokens) or prompt.endswith(REPLACEMENT):
        return  # a prompt that ends within a character has no text of its own
    assert prompt + answer(tokenizer, tokens[:place], tokens[place:], step) == tokenizer.decode(tokens)


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize("spelled", ["</s>", "<|end|>", "<s></s>", "</s", "\ue000\ue001"])
def test_only_what_is_spelled_out_changes(spelled: str, prepend: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, prepend=prepend, chat_template=TEMPLATE)
    tokenizer = Tokenizer(str(tmp_path))

    def prompt(said: str) -> list[int]:
        turns = [("user", f"I say {said} to you"), ("assistant", "Well."), ("user", "And then?")]
        return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns])

    ours, plain = prompt(spelled), prompt("Q")
    assert not {"</s>", "<|end|>"} & {tokenizer.decode([each], skip_special_tokens=False) for each in ours[2:6]}
    begin = next(place for place, (one, other) in enumerate(zip(ours, plain, strict=False)) if one != other)
    end = next(
        place for place, (one, other) in enumerate(zip(ours[::-1], plain[::-1], strict=False)) if one != other
    )
    texts = [tokenizer.decode(ids[begin : len(ids) - end], skip_special_tokens=False) for ids in (ours, plain)]
    assert texts == [spelled, "Q"]


def num_alike(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning of both."""
    return next(place for place, (each, theirs) in enumerate(zip(one, other, strict=False)) if each != theirs)


PARTS = (
    "{% for message in messages %}<s>{{ message['role'] }}:"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "</s>{% endfor %}"
)


def test_a_template_that_wants_parts_gets_them(tmp_path: Path) -> None:
    """As those of Llama Guard 3 and of LLaVA do. A text is no list of parts: it would be left out."""
    write_tokenizer(tmp_path, chat_template=PARTS)
    tokenizer = Tokenizer(str(tmp_path))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}]
    text = tokenizer.decode(tokenizer.apply_chat_template(turns), skip_special_tokens=False)
    assert text.replace(" ", "") == "<s>system:Bekind.</s><s>user:Hellothere</s>"
    plain = [{"role": "user", "content": "Hello there"}]
    assert "Hello there" in tokenizer.decode(tokenizer.apply_chat_template(plain, template=TEMPLATE))


def test_a_tokenizer_model_alone(tmp_path: Path) -> None:
    """As SentencePiece itself writes it, without the tokenizer.json that was made of it."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        minloglevel=2,
    )
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"legacy": False}))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer(str(tmp_path))
    for text in ("the sky", "Alice was beginning to get very tired", "é 🎠 1234"):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
