"""Chats beside users of the class low: what the chats keep of their tokens a second, whoever else sends how much.

8 users chat, one question after the other, without a pause. Meanwhile low users come and go: each always has two
requests with a long prompt in flight. Times with them and without take turns, so that what slows the machine slows
both; the first seconds of each time are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator

from tqdm import tqdm

from benchmarks.asked import asked, prompts
from benchmarks.own_server import OwnServer, own_server
from server.bench.load import Outcome
from server.bench.workload import LoadRequest

CHATS = 8
LONG_WORDS = 900
NUM_LOW = (1, 30)
SECONDS, SETTLING = 15.0, 3.0
"""Of a time with low users, or without; and its first part, which is not counted."""


def long_prompts(first_user: int, count: int) -> Iterator[LoadRequest]:
    """For ever, of the low users in turn: as many of the texts as make a long prompt."""
    words = " ".join(prompts()).split()
    for number in itertools.count():
        start = 97 * number % (len(words) - LONG_WORDS)
        text = f"Text {number}: " + " ".join(words[start : start + LONG_WORDS])
        yield LoadRequest(text, 64, user=first_user + number % count)


def questions(seed: int, ended: asyncio.Event) -> Iterator[LoadRequest]:
    """Until it is the end."""
    for number in itertools.count():
        for request in asked(1000, seed=seed + number, num_users=CHATS):
            if ended.is_set():
                return
            yield request


async def in_turns(server: OwnServer, num_low: int, rounds: int, seed: int) -> list[float]:
    """Tokens a second of the chats: alone, beside the low users, alone, and so on; alone at the end."""
    client, ended = server.chats(), asyncio.Event()
    started = time.perf_counter()
    chatting = asyncio.create_task(client.closed_loop(questions(seed, ended), CHATS))
    crowds = long_prompts(CHATS, num_low)
    spans = []
    await asyncio.sleep(SECONDS)  # warm
    for is_beside in tqdm(([False, True] * rounds) + [False], desc=f"{num_low} low users", unit="time"):
        begun = time.perf_counter() - started
        if is_beside:
            crowd = asyncio.create_task(client.closed_loop(crowds, 2 * num_low))
        await asyncio.sleep(SECONDS)
        if is_beside:
            crowd.cancel()
            await asyncio.gather(crowd, return_exceptions=True)
        spans.append((begun + SETTLING, begun + SECONDS))
    ended.set()
    outcomes = (await chatting).outcomes
    return [tokens_within(outcomes, *span) / (SECONDS - SETTLING) for span in spans]


def tokens_within(outcomes: list[Outcome], begin: float, end: float) -> float:
    """A piece of an answer may have several tokens: each counts as the answer's pieces do in the mean."""
    return sum(
        outcome.num_tokens / len(outcome.arrivals) * sum(begin <= when < end for when in outcome.arrivals)
        for outcome in outcomes
        if outcome.arrivals
    )


def run(args: argparse.Namespace) -> None:
    print("low users   chats alone   beside them   kept, of the times before and after (each)")
    for num_low in NUM_LOW:
        low = [f"low{number}" for number in range(num_low)]
        users = dict.fromkeys([*(f"chat{number}" for number in range(CHATS)), *low], 1.0)
        with own_server(users=users, low=low) as server:
            rates = asyncio.run(in_turns(server, num_low, args.rounds, args.seed))
        alone, beside = rates[::2], rates[1::2]
        kept = [2 * rate / (before + after) for before, rate, after in zip(alone, beside, alone[1:], strict=False)]
        each = ", ".join(f"{share:.2f}" for share in kept)
        print(
            f"{num_low:9} {statistics.median(alone):11.0f}/s {statistics.median(beside):11.0f}/s   "
            f"{statistics.median(kept):.2f} ({each})",
            flush=True,
        )
