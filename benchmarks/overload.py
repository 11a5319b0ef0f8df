"""What is promised under load: smooth streams while long prompts arrive, and goodput under ten times too much.

python -m benchmarks.overload itl         # --target-itl-ms among 16 streams, against no target
python -m benchmarks.overload flood       # 20 users, ten times the load that the server can take
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys

from tqdm import tqdm

from benchmarks.asked import asked
from benchmarks.own_server import OwnServer, own_server
from server.bench.load import Outcome
from server.bench.report import Quantiles, throughput
from server.bench.workload import LoadRequest, arrival_times, make_requests, words

NUM_STREAMS = 16


async def streams_and_prompts(server: OwnServer, seed: int) -> tuple[list[Outcome], list[Outcome]]:
    """16 streams that go on all the time, and long prompts that arrive among them: outcomes of both."""
    load = server.client()
    rng = random.Random(seed)
    streams = asked(3 * NUM_STREAMS, seed=seed)
    prompts = [LoadRequest(words(rng, rng.randint(1000, 2500)), 16) for _ in range(16)]
    times = list(arrival_times("poisson", prompts, rate=1.2, seed=seed))
    await load.closed_loop(make_requests("summarise", 8, seed=seed + 1), 8)  # warm, and time to learn
    running, arriving = await asyncio.gather(
        server.chats().closed_loop(streams, NUM_STREAMS), load.open_loop(prompts, times)
    )
    return running.outcomes, arriving.outcomes


def run_itl(args: argparse.Namespace) -> None:
    results: dict[str, list[tuple[list[Outcome], list[Outcome]]]] = {"none": [], f"{args.target:g} ms": []}
    for turn in tqdm(range(2 * args.rounds), desc="itl", unit="turn"):
        name = list(results)[(turn + turn // 2) % 2]
        flags = [] if name == "none" else ["--target-itl-ms", str(args.target)]
        with own_server(*flags) as server:
            results[name].append(asyncio.run(streams_and_prompts(server, args.seed + turn // 2)))
    print("target    streams' ITL p50 / p99     long prompts' TTFT p50 / p99    tokens/s in and out")
    for name, runs in results.items():
        itl = Quantiles.of([itl for streams, _ in runs for outcome in streams for itl in outcome.itls])
        ttft = Quantiles.of([outcome.ttft for _, prompts in runs for outcome in prompts])
        rates = []
        for streams, prompts in runs:
            outcomes = streams + prompts
            end = max(outcome.ended for outcome in outcomes)
            rates.append(sum(outcome.num_tokens + outcome.num_prompt_tokens for outcome in outcomes) / end)
        print(
            f"{name:8} {1000 * itl.p50:10.0f} / {1000 * itl.p99:3.0f} ms {ttft.p50:17.2f} / {ttft.p99:.2f} s "
            f"{sum(rates) / len(rates):20.0f}"
        )


NUM_USERS = 20


async def flood(server: OwnServer, seconds: float, seed: int) -> None:
    load = server.chats()
    requests = asked(320, seed=seed, num_users=NUM_USERS)
    await load.closed_loop(requests[:64], 64)  # warm
    full = await load.closed_loop(requests, 96)
    capacity = throughput(full.outcomes)
    rate = 10 * len(full.outcomes) / full.duration
    many = asked(round(rate * seconds), seed=seed + 1, num_users=NUM_USERS)
    times = list(arrival_times("poisson", many, rate=rate, seed=seed))
    before = server.memory()
    memory: list[int] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(10)
            memory.append(server.memory())

    watching = asyncio.create_task(watch())
    with tqdm(total=len(many), desc=f"{rate:.0f} requests/s", unit="request") as bar:
        result = await load.open_loop(many, times, bar)
    watching.cancel()
    done = [outcome for outcome in result.outcomes if outcome.error is None]
    refused = [outcome for outcome in result.outcomes if (outcome.error or "").startswith("429")]
    failed = len(result.outcomes) - len(done) - len(refused)
    tokens = sum(
        outcome.num_tokens * sum(at <= seconds for at in outcome.arrivals) / len(outcome.arrivals)
        for outcome in done
    )
    answer = Quantiles.of([outcome.e2e for outcome in refused])
    print(f"capacity (closed loop, 96 in flight): {capacity:.0f} tok/s, {rate / 10:.1f} requests/s")
    print(
        f"{seconds:g} s at {rate:.0f} requests/s: {tokens / seconds:.0f} tok/s, "
        f"{tokens / seconds / capacity:.1%} of it"
    )
    print(f"{len(done)} answered, {len(refused)} refused, {failed} failed otherwise")
    print(f"refusals answered in {1000 * answer.p50:.0f} ms (p50), {1000 * answer.p99:.0f} ms (p99)")
    mebibytes = [round(each / 2**20) for each in (before, *memory)]
    preempted = sum((await server.metrics("carousel_preemptions_total")).values())
    print(f"{preempted:.0f} sequences gave up their seat and resumed")
    print(f"memory of server and engine, MiB, before and every 10 s: {', '.join(map(str, mebibytes))}")


def run_flood(args: argparse.Namespace) -> None:
    # A pool that the warm-up fills: a larger one goes on taking memory until every block has been used once.
    users = {f"user{number}": 1.0 for number in range(NUM_USERS)}
    with own_server("--kv-cache-memory", "1GiB", users=users) as server:
        asyncio.run(flood(server, args.seconds, args.seed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["itl", "flood"])
    parser.add_argument("--target", type=float, default=100, help="itl: the target in ms (default: 100)")
    parser.add_argument("--rounds", type=int, default=2, help="itl: turns of each (default: 2)")
    parser.add_argument("--seconds", type=float, default=120, help="flood: how long (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    args = parser.parse_args()
    {"itl": run_itl, "flood": run_flood}[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
