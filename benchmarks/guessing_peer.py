"""Guessed tokens here and in llama.cpp: tokens/s of one client, where answers repeat their prompt and in chat.

    python -m benchmarks.guessing_peer

Carousel and llama.cpp's server with the default model's own file, each with guesses from the text and without, in
turns; who does not run is paused. llama.cpp is installed first, which takes a quarter of an hour, once. Answers
are greedy. What each server has cached of the prompts it may use.
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
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "with guesses": {CAROUSEL: ("--speculative", "auto"), LLAMA_CPP: ("--spec-type", "ngram-mod")},
    "without": {CAROUSEL: ("--speculative", "off"), LLAMA_CPP: ()},
}
"""Their flags."""

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
            for way, flags in WAYS.items():
                command = replace(service, command=[*service.command, *flags[peer.name]])
                named = replace(peer, name=f"{peer.name}, {way}")
                servers[peer.name, way] = stack.enter_context(running(named, command, load))
                servers[peer.name, way].pause()
        for _ in tqdm(range(args.rounds), desc="turns of each", file=sys.stderr):
            for kind, texts in PROMPTS.items():
                for (name, way), server in servers.items():
                    with server.turn():
                        found = asyncio.run(speed(server, texts, args.max_tokens))
                    speeds.setdefault((kind, name, way), []).append(found)
    print(f"{processor()}, {MODELS['default'].title}: medians of {args.rounds} turns\n")
    print("| answers | server | with guesses | without | ratio |\n| --- | --- | --- | --- | --- |")
    for kind in PROMPTS:
        for name in dict.fromkeys(name for name, _ in servers):
            guessed, plain = (speeds[kind, name, way] for way in WAYS)
            ratio = statistics.median(one / other for one, other in zip(guessed, plain, strict=True))
            fast, slow = statistics.median(guessed), statistics.median(plain)
            print(f"| {kind} | {name} | {fast:.1f} | {slow:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
