"""Guessed tokens here and in llama.cpp: tokens/s of one client, where answers repeat their prompt and in chat.

    python -m benchmarks.guessing_peer

Carousel and llama.cpp's server with the default model's own file, each without guesses and with each kind of guess
from the text that it knows, as it comes, in turns; who does not run is paused. llama.cpp is installed first, which
takes a quarter of an hour, once. Answers are greedy. What each server has cached of the prompts it may use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import aiohttp
from tqdm import tqdm

from benchmarks.peers.catalogue import CAROUSEL, Load
from benchmarks.peers.models import MODELS
from benchmarks.peers.running import Server, prepare, running
from benchmarks.processor import processor
from benchmarks.speculation import QUESTIONS, copied

LLAMA_CPP = "llama.cpp"
GUESSES: dict[str, dict[str, tuple[str, ...]]] = {
    CAROUSEL: {"none": ("--speculative", "off"), "auto": ()},
    LLAMA_CPP: {
        "none": (),
        **{kind: ("--spec-type", kind) for kind in ("ngram-simple", "ngram-map-k", "ngram-mod", "ngram-cache")},
    },
}
"""The flags of each kind."""

PROMPTS = {
    "repeats its prompt": [copied(number) for number in range(8)],
    "chat": list(QUESTIONS[:8]),
}


async def speed(server: Server, texts: Sequence[str], max_tokens: int) -> float:
    """Output tokens/s of one answer after the other."""
    num_tokens = 0
    started = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        for text in texts:
            body = {
                "model": server.client.model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            async with session.post(f"{server.client.url}/v1/chat/completions", json=body) as response:
                num_tokens += (await response.json())["usage"]["completion_tokens"]
    return num_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=192, help="longest answer (default: 192)")
    args = parser.parse_args()
    load = Load(MODELS["default"], processor(), seats=1, context=4096)
    ready = prepare([CAROUSEL, LLAMA_CPP], load)
    speeds: dict[tuple[str, str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = {}
        for peer, service in ready:
            for guesses, flags in GUESSES[peer.name].items():
                command = replace(service, command=[*service.command, *flags])
                named = replace(peer, name=f"{peer.name}, {guesses}")
                servers[peer.name, guesses] = stack.enter_context(running(named, command, load))
                servers[peer.name, guesses].pause()
        for _ in tqdm(range(args.rounds), desc="turns of each", file=sys.stderr):
            for kind, texts in PROMPTS.items():
                for (name, guesses), server in servers.items():
                    with server.turn():
                        tokens_per_second = asyncio.run(speed(server, texts, args.max_tokens))
                    speeds.setdefault((kind, name, guesses), []).append(tokens_per_second)
    print(f"{processor()} ({processor().kind}), {MODELS['default'].title}: medians of {args.rounds} turns\n")
    print("| answers | server | guesses | tokens/s | times without |\n| --- | --- | --- | --- | --- |")
    for (kind, name, guesses), found in speeds.items():
        plain = speeds[kind, name, "none"]
        ratio = statistics.median(one / other for one, other in zip(found, plain, strict=True))
        print(f"| {kind} | {name} | {guesses} | {statistics.median(found):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
