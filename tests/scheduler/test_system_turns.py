"""System turns stand anywhere in a conversation, and every chat template gets them as it can carry them."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from scheduler.text.tokenizer import Tokenizer

EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FIRST = "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
OTHERS = "{% for m in messages[(1 if messages[0].role == 'system' else 0):] %}"
REFUSE = "{% if m.role == 'system' %}{{ raise_exception('System message must be at the beginning') }}{% endif %}"
TURN = "<{{ m.role }}>{{ m.content }}"
ALTERNATE = """{% set ns = namespace(users=true) %}{% for m in messages %}{% if m.role == 'user' or (m.role == \
'assistant' and not m.tool_calls) %}{% if (m.role == 'user') != ns.users %}{{ raise_exception('roles must \
alternate') }}{% endif %}{% set ns.users = not ns.users %}{% endif %}{% endfor %}"""

ANYWHERE = EACH
ONLY_FIRST = FIRST + OTHERS + REFUSE + TURN + "{% endfor %}"
"""As Qwen3.5's."""
FIRST_AND_SILENT = FIRST + OTHERS + "{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}"
"""Others are left out without a word, as by gpt-oss's."""
NONE = "{% for m in messages %}" + REFUSE + TURN + "{% endfor %}" + ALTERNATE
"""As Gemma 2's."""
ONE_AND_TURNS_ALTERNATE = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% endif %}" + NONE
)
"""As Mistral's."""


def said(*turns: str) -> list[dict[str, Any]]:
    """Turns by the first letter of their role, and what they say."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages: list[dict[str, Any]] = [{"role": roles[turn[0]], "content": turn} for turn in turns]
    for message, follower in pairwise(messages):
        if follower["role"] == "tool" and message["role"] == "assistant":
            message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    return messages


@pytest.mark.parametrize(
    ("template", "turns", "prompt"),
    [
        (ANYWHERE, ("s0", "s1", "u0", "s2"), "<system>s0<system>s1<user>u0<system>s2"),
        (ONLY_FIRST, ("s0", "u0", "a0", "u1"), "<system>s0<user>u0<assistant>a0<user>u1"),
        (ONLY_FIRST, ("s0", "s1", "u0"), "<system>s0\n\ns1<user>u0"),
        (ONLY_FIRST, ("u0", "s0", "s1", "a0", "u1"), "<user>u0\n\ns0\n\ns1<assistant>a0<user>u1"),
        (ONLY_FIRST, ("s0", "u0", "a0", "s1", "u1"), "<system>s0<user>u0<assistant>a0<user>s1\n\nu1"),
        (ONLY_FIRST, ("u0", "a0", "t0", "s0"), "<user>u0<assistant>a0<tool>t0\n\ns0"),
        (ONLY_FIRST, ("u0", "a0", "s0"), "<user>u0<assistant>a0<user>s0"),
        (FIRST_AND_SILENT, ("s0", "u0", "s1"), "<system>s0<user>u0\n\ns1"),
        (NONE, ("s0", "s1", "u0", "s2"), "<user>s0\n\ns1\n\nu0\n\ns2"),
        (NONE, ("s0", "a0", "u0"), "<user>s0<assistant>a0<user>u0"),
        (NONE, ("s0",), "<user>s0"),
        (ONE_AND_TURNS_ALTERNATE, ("s0", "u0", "s1", "a0", "u1"), "<system>s0<user>u0\n\ns1<assistant>a0<user>u1"),
        (
            ONE_AND_TURNS_ALTERNATE,
            ("u0", "a0", "t0", "s0", "a1", "s1", "u1"),
            "<user>u0<assistant>a0<tool>t0\n\ns0<assistant>a1<user>s1\n\nu1",
        ),
    ],
)
def test_each_template_gets_them_as_it_can(
    model_path: str, template: str, turns: tuple[str, ...], prompt: str
) -> None:
    tokenizer = Tokenizer(model_path, chat_template=template)
    assert tokenizer.decode(tokenizer.apply_chat_template(said(*turns))) == prompt


@pytest.mark.parametrize("template", [ANYWHERE, ONLY_FIRST, FIRST_AND_SILENT, NONE, ONE_AND_TURNS_ALTERNATE])
def test_nothing_is_lost_and_nothing_is_moved(model_path: str, template: str) -> None:
    tokenizer = Tokenizer(model_path, chat_template=template)
    rng = random.Random(0)
    for _ in range(200):
        letters = "s" * rng.randint(0, 2)
        for _ in range(rng.randint(0, 3)):
            letters += "u" + "s" * rng.randint(0, 2)
            letters += rng.choice(["", "at", "atts"]) + "a" + "s" * rng.randint(0, 2)
        turns = [f"{letter}{place:02}" for place, letter in enumerate(f"{letters}u")]
        text = tokenizer.decode(tokenizer.apply_chat_template(said(*turns)))
        places = [text.find(turn) for turn in turns]
        assert -1 not in places, (turns, text)
        assert places == sorted(places), (turns, text)


def test_a_later_one_leaves_the_prompt_before_it_as_it_was(model_path: str) -> None:
    """So that the prefix cache finds it."""
    tokenizer = Tokenizer(model_path, chat_template=ONLY_FIRST)
    before = tokenizer.decode(tokenizer.apply_chat_template(said("s0", "u0")))
    after = tokenizer.decode(tokenizer.apply_chat_template(said("s0", "u0", "s1", "a0", "s2", "u1")))
    assert after.startswith(before)
