"""What is left of the throughput while other programs use the machine too, beside what a peer keeps.

python -m benchmarks.sharing                        # a busy loop that is pinned to one core
python -m benchmarks.sharing --busy compilers       # four compilers
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from benchmarks.peers.catalogue import PEERS, Load
from benchmarks.peers.installing import PeerError
from benchmarks.peers.models import MODELS
from benchmarks.peers.running import prepare, running
from benchmarks.processor import ProcessorError, processor
from server.bench.load import LoadClient
from server.bench.report import throughput
from server.bench.workload import LoadRequest, words

SERVERS = ("carousel", "openvino-genai-int8")
ANSWER = 56
NUM_COMPILERS = 4
MOST_SECONDS = 120
"""For what is in flight when a turn's time is up."""

_LOOP = "while True: pass"
_COMPILE = """
import subprocess
while True:
    subprocess.run(["g++", "-O2", "-c", "-o", "/dev/null", "busy.cpp"], check=True)
"""
_SOURCE = "#include <regex>\n#include <map>\n" + "".join(
    f"std::map<int, std::regex> f{number}(const char* s) {{ return {{{{{number}, std::regex(s)}}}}; }}\n"
    for number in range(40)
)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Other programs run in here: `core`, a loop that has the last core, or `compilers`. Nothing: `quiet`."""
    with tempfile.TemporaryDirectory(prefix="carousel-busy-") as folder:
        (Path(folder) / "busy.cpp").write_text(_SOURCE)
        code, count = {"quiet": ("", 0), "core": (_LOOP, 1), "compilers": (_COMPILE, NUM_COMPILERS)}[what]
        started = [
            subprocess.Popen([sys.executable, "-c", code], cwd=folder, start_new_session=True)
            for _ in range(count)
        ]
        try:
            if what == "core":
                os.sched_setaffinity(started[0].pid, {max(os.sched_getaffinity(0))})
            yield
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


async def turn(client: LoadClient, concurrency: int, seconds: float, seed: int) -> float:
    """Tokens per second of short requests that are sent for so long."""
    rng = random.Random(f"sharing {seed}")
    end = time.monotonic() + seconds

    def requests() -> Iterator[LoadRequest]:
        while time.monotonic() < end:
            yield LoadRequest(words(rng, rng.randint(8, 24)), ANSWER)

    result = await asyncio.wait_for(client.closed_loop(requests(), concurrency), seconds + MOST_SECONDS)
    for outcome in result.outcomes:
        if outcome.error is not None:
            raise PeerError(f"a request failed: {outcome.error}")
    return throughput(result.outcomes)


def measure(names: list[str], load: Load, args: argparse.Namespace) -> dict[tuple[str, int, str], list[float]]:
    """Each server's throughput, by its name, concurrency, and what else ran."""
    rates: dict[tuple[str, int, str], list[float]] = {}
    with ExitStack() as stack:
        servers = []
        for peer, service in prepare(names, load):
            server = stack.enter_context(running(peer, service, load))
            with server.turn() as client:
                asyncio.run(turn(client, max(args.concurrency), 3, seed=999))  # warm
            servers.append(server)
        turns = [
            (number, concurrency, server, what)
            for number in range(args.rounds)
            for concurrency in args.concurrency
            for server in servers
            for what in (("quiet", args.busy) if number % 2 == 0 else (args.busy, "quiet"))
        ]
        for number, concurrency, server, what in (bar := tqdm(turns, desc="sharing", unit="turn")):
            bar.set_postfix_str(f"{server.peer.name}, C={concurrency}, {what}")
            with server.turn() as client, busy(what):
                rate = asyncio.run(turn(client, concurrency, args.seconds, args.seed + number))
            rates.setdefault((server.peer.name, concurrency, what), []).append(rate)
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--busy",
        choices=["core", "compilers"],
        default="core",
        help="what else runs: a busy loop on one core, or four loops of g++ -O2 (default: core)",
    )
    parser.add_argument(
        "--servers", default=",".join(SERVERS), help=f"of {', '.join(PEERS)} (default: {', '.join(SERVERS)})"
    )
    parser.add_argument("--concurrency", default="1,8", help="requests in flight (default: 1,8)")
    parser.add_argument("--seconds", type=float, default=15, help="of each turn (default: 15)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    parser.add_argument("--flags", default="", help="more flags of `carousel serve`")
    args = parser.parse_args()
    names = args.servers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"unknown servers: {', '.join(sorted(unknown))}")
    args.concurrency = [int(part) for part in args.concurrency.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers, paused or not, are ended too
    try:
        load = Load(MODELS["default"], processor(), flags=tuple(shlex.split(args.flags)))
        rates = measure(names, load, args)
    except (ProcessorError, PeerError) as error:
        print(f"sharing: {error}", file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"sharing: a turn was not done {MOST_SECONDS} s after its time", file=sys.stderr)
        return 1
    print(f"tokens/s, quiet and with {args.busy}, medians of {args.rounds} rounds of {args.seconds:g} s")
    for concurrency in args.concurrency:
        for name in names:
            quiet, shared = (statistics.median(rates[name, concurrency, what]) for what in ("quiet", args.busy))
            print(f"C={concurrency:<3} {name:22} {quiet:7.1f} {shared:7.1f}   kept {shared / quiet:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
