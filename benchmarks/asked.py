"""Real text as load: questions, documents and code that people could send, in `asked.toml`, of our own writing.

Random words and answers that may not end go round in circles, which flatters whoever guesses. So what is measured
for its speed is asked from here, as chat, at a temperature, and answers end where the model ends them.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

from server.bench.workload import LoadRequest

TEXTS = Path(__file__).with_name("asked.toml")

MOST_TOKENS = 256
"""Of an answer."""

_LAST_DAY = datetime(2026, 12, 31)


@cache
def prompts() -> tuple[str, ...]:
    """Everything that is asked: the plain questions, and each task with each document and each piece of code."""
    texts = tomllib.loads(TEXTS.read_text())
    tasks = (("tasks", "documents"), ("code_tasks", "code"))
    return (
        *texts["asked"],
        *(task.format(given.strip()) for kind, about in tasks for task in texts[kind] for given in texts[about]),
    )


def asked(count: int, *, seed: int, most: int = MOST_TOKENS, num_users: int = 1) -> list[LoadRequest]:
    """`count` chats with answers of at most `most` tokens, in an order that the seed draws, each once before one
    comes again; dealt to the users in turn. Each has a day and a time in front of it, as many a chat has, so that
    none finds more than a few tokens of another in a cache."""
    rng = random.Random(f"asked {seed}")
    order = _order(rng)
    return [
        LoadRequest(next(order), most, user=index % num_users, seed=rng.getrandbits(31), system=_system(rng))
        for index in range(count)
    ]


def _order(rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(prompts(), len(prompts()))


def _system(rng: random.Random) -> str:
    now = _LAST_DAY - timedelta(minutes=rng.randrange(2 * 365 * 24 * 60))
    return f"It is {now:%H:%M} on {now:%A, %d %B %Y}. You are a helpful assistant."
