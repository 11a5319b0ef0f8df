"""Chats beside users of the class low: what the chats keep of their tokens a second, whoever else sends how much.

8 users chat, each with one question after the other, alone and beside low users in turns. Each low user always has
two requests with a long prompt in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
from collections.abc import Iterator

from tqdm import tqdm

from benchmarks.asked import asked, prompts
from benchmarks.own_server import OwnServer, own_server
from server.bench.load import LoadClient
from server.bench.report import throughput
from server.bench.workload import LoadRequest

CHATS, QUESTIONS = 8, 64
LONG_WORDS = 900
NUM_LOW = (1, 30)


def long_prompts(first_user: int, count: int) -> Iterator[LoadRequest]:
    """For ever, of the low users in turn: as many of the texts as make a long prompt."""
    words = " ".join(prompts()).split()
    for number in itertools.count():
        start = 97 * number % (len(words) - LONG_WORDS)
        text = f"Text {number}: " + " ".join(words[start : start + LONG_WORDS])
        yield LoadRequest(text, 64, user=first_user + number % count)


async def in_turns(server: OwnServer, num_low: int, rounds: int, seed: int) -> list[tuple[float, float]]:
    """Tokens a second of the chats alone, and beside the low users, of each round."""
    client: LoadClient = server.chats()
    await client.closed_loop(asked(16, seed=seed + 999, num_users=CHATS), CHATS)  # warm
    rates = []
    for turn in tqdm(range(rounds), desc=f"{num_low} low users", unit="round"):
        alone = await client.closed_loop(asked(QUESTIONS, seed=seed + 2 * turn, num_users=CHATS), CHATS)
        crowd = asyncio.create_task(client.closed_loop(long_prompts(CHATS, num_low), 2 * num_low))
        await asyncio.sleep(2)
        beside = await client.closed_loop(asked(QUESTIONS, seed=seed + 2 * turn + 1, num_users=CHATS), CHATS)
        crowd.cancel()
        await asyncio.gather(crowd, return_exceptions=True)
        rates.append((throughput(alone.outcomes), throughput(beside.outcomes)))
    return rates


def run(args: argparse.Namespace) -> None:
    print("low users   chats alone   beside them   kept (each round)")
    for num_low in NUM_LOW:
        low = [f"low{number}" for number in range(num_low)]
        users = dict.fromkeys([*(f"chat{number}" for number in range(CHATS)), *low], 1.0)
        with own_server(users=users, low=low) as server:
            rates = asyncio.run(in_turns(server, num_low, args.rounds, args.seed))
        kept = [beside / alone for alone, beside in rates]
        alone, beside = (statistics.median(values) for values in zip(*rates, strict=True))
        each = ", ".join(f"{share:.2f}" for share in kept)
        print(f"{num_low:9} {alone:11.0f}/s {beside:11.0f}/s   {statistics.median(kept):.2f} ({each})", flush=True)
