"""Long prompts: how fast they are computed, and what they do to those who are chatting meanwhile.

    python -m benchmarks.long_prompts rate         # four prompts of 4,000 to 6,000 tokens, and the peers
    python -m benchmarks.long_prompts streams      # 8 chats alone, then beside such prompts: Carousel only

One server runs at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.asked import asked
from benchmarks.peers.catalogue import CAROUSEL, PEERS, Load, Peer, Service
from benchmarks.peers.installing import PeerError
from benchmarks.peers.models import MODELS
from benchmarks.peers.running import prepare, running
from benchmarks.processor import ProcessorError, processor
from server.bench.load import LoadClient, Outcome, RunResult
from server.bench.report import Quantiles
from server.bench.workload import LoadRequest, words

NUM_PROMPTS = 4
NUM_CHATS = 8
ANSWER = 16
CONTEXT = 6400
MOST_CHATS = 1000
SERVERS = ("carousel", "openvino-genai-int8", "openvino-genai-int4", "llama.cpp-q4_0", "ik_llama.cpp-q4_0")


@dataclass(frozen=True, slots=True)
class Sizer:
    """Counts tokens with the model's own tokenizer, since not every server says how many a prompt has."""

    folder: Path

    def __call__(self, requests: Sequence[LoadRequest]) -> int:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.folder))
        return sum(len(tokenizer(request.prompt)["input_ids"]) for request in requests)


def long_prompts(lengths: tuple[int, int], seed: int) -> list[LoadRequest]:
    """Four prompts that have nothing in common, their lengths spread evenly; a word is a token."""
    low, high = lengths
    rng = random.Random(f"long prompts {seed}")
    step = (high - low) / (NUM_PROMPTS - 1)
    return [LoadRequest(words(rng, round(low + number * step)), ANSWER) for number in range(NUM_PROMPTS)]


# The rate -----------------------------------------------------------------------------------------------


def run_rate(args: argparse.Namespace, ready: list[tuple[Peer, Service]], load: Load) -> None:
    count = Sizer(load.model.safetensors())
    print("server                 prompt tokens/s   TTFT p50     worst   all done after")
    for peer, service in tqdm(ready, desc="long prompts", unit="server"):
        rates, ttfts, durations, errors = [], [], [], []
        try:
            with running(peer, service, load) as server:
                asyncio.run(server.client.closed_loop([LoadRequest("Once upon a time", 8)] * 2, 2))  # warm
                for number in range(args.rounds):
                    requests = long_prompts(args.tokens, args.seed + number)
                    result = asyncio.run(server.client.closed_loop(requests, NUM_PROMPTS))
                    errors += [outcome.error for outcome in result.outcomes if outcome.error is not None]
                    ttfts += [outcome.ttft for outcome in result.outcomes if outcome.arrivals]
                    durations.append(result.duration)
                    rates.append(count(requests) / result.duration)
        except PeerError as error:
            tqdm.write(f"{peer.name} is left out: {error}", file=sys.stderr)
            continue
        if errors:
            tqdm.write(f"{peer.name}: {len(errors)} requests failed, the first with: {errors[0]}")
            continue
        tqdm.write(
            f"{peer.name:22} {statistics.median(rates):15.0f} {statistics.median(ttfts):8.1f} s "
            f"{max(ttfts):7.1f} s {statistics.median(durations):14.1f} s"
        )


# The streams --------------------------------------------------------------------------------------------


async def chat(client: LoadClient, seed: int, until: float | asyncio.Task[RunResult]) -> RunResult:
    """8 streams that go on for so many seconds, or until something is done."""
    start = time.monotonic()

    def requests() -> Iterator[LoadRequest]:
        for request in asked(MOST_CHATS, seed=seed):
            if time.monotonic() - start > until if isinstance(until, float) else until.done():
                break
            yield request

    return await client.chatting().closed_loop(requests(), NUM_CHATS)


async def beside(client: LoadClient, args: argparse.Namespace, number: int) -> tuple[RunResult, RunResult]:
    """The chats, and the long prompts that come to them after two seconds."""

    async def arrive() -> RunResult:
        await asyncio.sleep(2)
        return await client.closed_loop(long_prompts(args.tokens, args.seed + number), NUM_PROMPTS)

    arriving = asyncio.create_task(arrive())
    chats = await chat(client, args.seed + 100 + number, arriving)
    return chats, await arriving


def _gaps(outcomes: Sequence[Outcome], end: float) -> list[float]:
    """The times between a stream's tokens, as far as they lie before `end`."""
    return [
        after - before
        for outcome in outcomes
        for before, after in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
        if before < end
    ]


def run_streams(args: argparse.Namespace, ready: list[tuple[Peer, Service]], load: Load) -> None:
    count = Sizer(load.model.safetensors())
    alone, together, rates = [], [], []
    (peer, service) = ready[0]
    with running(peer, service, load) as server:
        asyncio.run(chat(server.client, args.seed + 999, 5.0))  # warm
        for number in tqdm(range(args.rounds), desc="streams", unit="round"):
            quiet = asyncio.run(chat(server.client, args.seed + number, args.seconds))
            chats, prompts = asyncio.run(beside(server.client, args, number))
            for result in (quiet, chats, prompts):
                for outcome in result.outcomes:
                    if outcome.error is not None:
                        raise PeerError(f"a request failed: {outcome.error}")
            alone += _gaps(quiet.outcomes, args.seconds)
            together += _gaps(chats.outcomes, 2 + prompts.duration)
            rates.append(count(long_prompts(args.tokens, args.seed + number)) / prompts.duration)
    print("8 chats        ITL p50      p90      p99")
    for name, gaps in (("alone", alone), ("beside prompts", together)):
        itl = Quantiles.of(gaps)
        print(f"{name:14} {1000 * itl.p50:4.0f} ms {1000 * itl.p90:5.0f} ms {1000 * itl.p99:5.0f} ms")
    ratio = Quantiles.of(together).p99 / Quantiles.of(alone).p99
    print(f"p99 beside / alone: {ratio:.2f}; the prompts beside them: {statistics.median(rates):.0f} tokens/s")


def _tokens(text: str) -> tuple[int, int]:
    try:
        low, high = (int(part) for part in text.split("-"))
    except ValueError:
        low, high = 0, 0
    if not 0 < low <= high <= CONTEXT - 2 * ANSWER:
        raise argparse.ArgumentTypeError(f"expected two lengths up to {CONTEXT - 2 * ANSWER}, as 4000-6000")
    return low, high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rate", "streams"])
    parser.add_argument("--servers", help=f"rate: of {', '.join(PEERS)} (default: {', '.join(SERVERS)})")
    parser.add_argument("--tokens", type=_tokens, default=(4000, 6000), help="of a prompt (default: 4000-6000)")
    parser.add_argument("--rounds", type=int, default=1, help="of other prompts each (default: 1)")
    parser.add_argument("--seconds", type=float, default=20.0, help="streams: alone for so long (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    parser.add_argument("--flags", default="", help='more flags of `carousel serve`, as "--target-itl-ms 100"')
    args = parser.parse_args()
    names = args.servers.split(",") if args.servers else [name for name in SERVERS if name in PEERS]
    if args.what == "streams":
        names = [CAROUSEL]
    if unknown := set(names) - set(PEERS):
        parser.error(f"unknown servers: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    try:
        seats = NUM_PROMPTS if args.what == "rate" else NUM_PROMPTS + NUM_CHATS
        load = Load(MODELS["default"], processor(), seats, CONTEXT, tuple(shlex.split(args.flags)))
        {"rate": run_rate, "streams": run_streams}[args.what](args, prepare(names, load), load)
    except (ProcessorError, PeerError) as error:
        print(f"long_prompts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
