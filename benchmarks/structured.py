"""What a form costs: tokens per second of answers held to a JSON schema, 32 at once, against as many free ones.

python -m benchmarks.structured                      # the default model, 6 turns of each
python -m benchmarks.structured --model Qwen2.5-Coder-0.5B-Instruct

All answers have the same number of tokens, at a temperature, so that free ones do not go round in circles, which
are easily guessed; how much of either repeats itself is printed. Turns alternate, so that a machine that slows
down slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.own_server import OwnServer, own_server
from benchmarks.processor import processor
from scheduler.config import DEFAULT_MODEL
from server.bench.report import circles

CONCURRENCY = 32
NUM_TOKENS = 64
WARM_SECONDS = 2.0
SECONDS = 8.0
PEOPLE = {
    "type": "array",
    "minItems": 20,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mood": {"enum": ["merry", "sober", "asleep"]},
        },
        "required": ["name", "age", "mood"],
        "additionalProperties": False,
    },
}
"""Long enough that no answer comes to its end."""

GENERATED = "carousel_generation_tokens_total"


async def turn(server: OwnServer, fields: dict[str, Any], texts: list[str]) -> float:
    """Tokens per second while clients have one answer after the other, which are put into `texts`. From the middle
    of it: forced tokens make answers differ in steps, so that some would still be at their last one when others
    have none left."""
    numbers = itertools.count()

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = {
                "messages": [{"role": "user", "content": f"Invent the guests of party {number}, as JSON."}],
                "max_tokens": NUM_TOKENS,
                "temperature": 0.7,
                "seed": number,
            }
            async with session.post(server.url + "/v1/chat/completions", json=body | fields) as response:
                answer = await response.json()
                assert answer["usage"]["completion_tokens"] == NUM_TOKENS
                texts.append(answer["choices"][0]["message"]["content"])

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        clients = [group.create_task(client(session)) for _ in range(CONCURRENCY)]
        await asyncio.sleep(WARM_SECONDS)
        started, before = time.perf_counter(), await server.metric(GENERATED)
        await asyncio.sleep(SECONDS)
        seconds, after = time.perf_counter() - started, await server.metric(GENERATED)
        for each in clients:
            each.cancel()
    return (after - before) / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default: 6)")
    args = parser.parse_args()
    free: dict[str, Any] = {"ignore_eos": True}
    held = {"guided_json": PEOPLE}
    ratios = []
    texts: dict[int, list[str]] = {id(free): [], id(held): []}
    print(processor())
    with own_server("--model", args.model) as server:
        for number in tqdm(range(args.rounds), unit="round"):
            order = [free, held] if number % 2 == 0 else [held, free]
            speeds = {id(fields): asyncio.run(turn(server, fields, texts[id(fields)])) for fields in order}
            ratios.append(speeds[id(held)] / speeds[id(free)])
            tqdm.write(f"free {speeds[id(free)]:6.0f} tokens/s   held {speeds[id(held)]:6.0f} tokens/s")
    print(f"held to a schema / free: {statistics.median(ratios):.3f} (median of {len(ratios)} rounds)")
    print(
        f"circles: {circles(texts[id(free)]):.1%} of the free answers, {circles(texts[id(held)]):.1%} of the held"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
