"""What a form costs: tokens per second of 32 answers held to a JSON schema, against as many free ones.

python -m benchmarks.structured                      # the default model, 6 turns of each
python -m benchmarks.structured --model Qwen2.5-Coder-0.5B-Instruct

All answers have the same number of tokens; turns alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.own_server import own_server
from benchmarks.processor import processor
from scheduler.config import DEFAULT_MODEL

CONCURRENCY = 32
NUM_TOKENS = 64
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


async def turn(url: str, fields: dict[str, Any]) -> float:
    """Tokens per second of two answers for each of the clients."""
    num_tokens = 0

    async def client(session: aiohttp.ClientSession, place: int) -> None:
        nonlocal num_tokens
        for number in range(2):
            body = {"prompt": f"Person {place}, as JSON:", "max_tokens": NUM_TOKENS, "seed": 2 * place + number}
            async with session.post(url + "/v1/completions", json=body | fields) as response:
                num_tokens += (await response.json())["usage"]["completion_tokens"]

    started = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session, place) for place in range(CONCURRENCY)))
    return num_tokens / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default: 6)")
    args = parser.parse_args()
    free: dict[str, Any] = {"ignore_eos": True}
    held = {"guided_json": PEOPLE}
    ratios = []
    print(processor())
    with own_server("--model", args.model) as server:
        for fields in (free, held):
            asyncio.run(turn(server.url, fields))  # warm
        for number in tqdm(range(args.rounds), unit="round"):
            order = [free, held] if number % 2 == 0 else [held, free]
            speeds = {id(fields): asyncio.run(turn(server.url, fields)) for fields in order}
            ratios.append(speeds[id(held)] / speeds[id(free)])
            tqdm.write(f"free {speeds[id(free)]:6.0f} tokens/s   held {speeds[id(held)]:6.0f} tokens/s")
    print(f"held to a schema / free: {statistics.median(ratios):.3f} (median of {len(ratios)} rounds)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
