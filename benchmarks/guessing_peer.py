"""Guessed tokens here and in llama.cpp: tokens/s of one client, where answers repeat their prompt and in chat.

    python -m benchmarks.guessing_peer

Carousel and llama.cpp's server with the default model's own file, each without guesses and with each kind of guess
from the text that it knows, as it comes, in turns; who does not run is paused. llama.cpp is installed first, which
takes a quarter of an hour, once. What repeats its prompt is greedy; chats are real text (`benchmarks.asked`) at a
temperature of 0.7, other ones each turn. What each server has cached of the prompts it may use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
from dataclasses import replace

from tqdm import tqdm

from benchmarks.asked import asked
from benchmarks.peers.catalogue import CAROUSEL, Load
from benchmarks.peers.installing import PeerError
from benchmarks.peers.models import MODELS
from benchmarks.peers.running import prepare, running
from benchmarks.processor import processor
from benchmarks.speculation import copied
from server.bench.load import CHAT, LoadClient
from server.bench.report import Slo, summarise
from server.bench.workload import LoadRequest

LLAMA_CPP = "llama.cpp"
GUESSES: dict[str, dict[str, tuple[str, ...]]] = {
    CAROUSEL: {"none": ("--speculative", "off"), "auto": ()},
    LLAMA_CPP: {
        "none": (),
        **{kind: ("--spec-type", kind) for kind in ("ngram-simple", "ngram-map-k", "ngram-mod", "ngram-cache")},
    },
}
"""The flags of each kind."""

NUM_REQUESTS = 8

REPEATS, CHATS = "repeats its prompt", "chat"


def load(kind: str, turn: int, max_tokens: int) -> tuple[dict[str, object], list[LoadRequest]]:
    """How a server is asked, and what."""
    if kind == REPEATS:
        return {"temperature": 0}, [LoadRequest(copied(number), max_tokens) for number in range(NUM_REQUESTS)]
    return dict(CHAT), asked(NUM_REQUESTS, seed=turn, most=max_tokens)


def speed(client: LoadClient, kind: str, turn: int, max_tokens: int) -> float:
    """Output tokens/s of one answer after the other."""
    sampling, requests = load(kind, turn, max_tokens)
    asking = replace(client, endpoint="chat", sampling=sampling)
    result = asyncio.run(asking.closed_loop(requests, 1))
    if errors := [outcome.error for outcome in result.outcomes if outcome.error is not None]:
        raise PeerError(f"a request failed: {errors[0]}")
    return summarise(kind, result, Slo()).output_tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=192, help="longest answer (default: 192)")
    parser.add_argument(
        "--kinds", nargs="+", choices=[REPEATS, CHATS], default=[REPEATS, CHATS], help="(default: both)"
    )
    args = parser.parse_args()
    room = Load(MODELS["default"], processor(), seats=1, context=4096)
    ready = prepare([CAROUSEL, LLAMA_CPP], room)
    speeds: dict[tuple[str, str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = {}
        for peer, service in ready:
            for guesses, flags in GUESSES[peer.name].items():
                command = replace(service, command=[*service.command, *flags])
                named = replace(peer, name=f"{peer.name}, {guesses}")
                servers[peer.name, guesses] = stack.enter_context(running(named, command, room))
                servers[peer.name, guesses].pause()
        for turn in tqdm(range(args.rounds), desc="turns of each", file=sys.stderr):
            for kind in args.kinds:
                for (name, guesses), server in servers.items():
                    with server.turn() as client:
                        tokens_per_second = speed(client, kind, turn, args.max_tokens)
                    speeds.setdefault((kind, name, guesses), []).append(tokens_per_second)
    print(f"{processor()} ({processor().kind}), {MODELS['default'].title}: medians of {args.rounds} turns\n")
    print("| answers | server | guesses | tokens/s | times without |\n| --- | --- | --- | --- | --- |")
    for (kind, name, guesses), found in speeds.items():
        plain = speeds[kind, name, "none"]
        ratio = statistics.median(one / other for one, other in zip(found, plain, strict=True))
        print(f"| {kind} | {name} | {guesses} | {statistics.median(found):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
