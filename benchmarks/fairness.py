"""How fair the machine is to several users: a noisy neighbour, weights, and what fairness costs.

python -m benchmarks.fairness neighbour    # one user floods, another sends small requests; with a picture
python -m benchmarks.fairness weights      # three backlogged users of weights 1, 2 and 4
python -m benchmarks.fairness cost         # equal users: throughput of fair against fcfs
python -m benchmarks.fairness low          # chats beside 1 and 30 users of the class low
python -m benchmarks.fairness queue        # the guest, the flood, and prompts that have to wait for blocks
python -m benchmarks.fairness scarce       # seats and blocks both scarce, simulated: what is thrown away
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from benchmarks import low, scarce
from benchmarks.asked import asked
from benchmarks.own_server import OwnServer, own_server
from server.bench.load import LoadClient, Outcome, RunResult
from server.bench.report import throughput
from server.bench.workload import LoadRequest, words

POLICIES = ("fair", "fcfs")
FLOOD = 128
"""Chats that the noisy neighbour begins at once."""


# A noisy neighbour --------------------------------------------------------------------------------------


def flood(seed: int) -> list[LoadRequest]:
    return asked(FLOOD, seed=seed)


async def guest(client: LoadClient, seed: int, is_over: Callable[[], bool], most: int) -> RunResult:
    """The second user: small requests, one after the other."""
    rng = random.Random(f"guest {seed}")
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    while len(outcomes) < most and not is_over():
        request = LoadRequest(words(rng, 8), 8, user=1)
        before = time.perf_counter() - start
        result = await client.closed_loop([request], 1)
        (outcome,) = result.outcomes
        outcome.sent += before
        outcome.ended += before
        outcome.arrivals = [at + before for at in outcome.arrivals]
        outcomes.append(outcome)
        await asyncio.sleep(0.05)
    return RunResult(outcomes, time.perf_counter() - start)


async def neighbour(server: OwnServer, seed: int) -> tuple[RunResult, RunResult, RunResult, RunResult]:
    """The guest on an idle server, the flood alone, then both: (idle guest, flood alone, guest, flood)."""
    load, chats = server.client(), server.chats()
    await chats.closed_loop(asked(16, seed=seed + 999, num_users=2), 16)  # warm
    idle = await guest(load, seed, lambda: False, 40)
    alone = await chats.closed_loop(flood(seed), FLOOD)
    both = asyncio.create_task(chats.closed_loop(flood(seed + 1), FLOOD))
    await asyncio.sleep(0.2)
    visiting = await guest(load, seed + 1, both.done, 1000)
    return idle, alone, visiting, await both


def run_neighbour(args: argparse.Namespace) -> None:
    runs = {}
    for policy in tqdm(POLICIES, desc="noisy neighbour", unit="policy"):
        with own_server("--policy", policy, users={"flood": 1, "guest": 1}) as server:
            runs[policy] = asyncio.run(neighbour(server, args.seed))
    print("policy   guest's TTFT: idle p50   under the flood: p50   worst       flood alone   with the guest")
    for policy, (idle, alone, visiting, flooding) in runs.items():
        usual = statistics.median(outcome.ttft for outcome in idle.outcomes)
        waits = [outcome.ttft for outcome in visiting.outcomes]
        middle, worst = statistics.median(waits), max(waits)
        before, after = throughput(alone.outcomes), throughput(flooding.outcomes)
        print(
            f"{policy:6} {1000 * usual:19.0f} ms {1000 * middle:15.0f} ms ({middle / usual:.1f}x)"
            f" {1000 * worst:7.0f} ms ({worst / usual:.1f}x) {before:9.0f} tok/s {after:8.0f} tok/s "
            f"({after / before - 1:+.1%})"
        )
    draw_neighbour(
        {policy: (visiting, flooding) for policy, (_, _, visiting, flooding) in runs.items()}, args.picture
    )


# Prompts that wait for blocks ---------------------------------------------------------------------------

FEW_BLOCKS = "100MiB"
"""Room for two long prompts, or a hundred chats."""


async def beside_readers(server: OwnServer, seed: int) -> tuple[RunResult, RunResult, RunResult]:
    """The guest on an idle server, then under the flood and beside a user whose long prompts wait for blocks; and
    those prompts."""
    idle = await guest(server.client(), seed, lambda: False, 40)
    flooding = asyncio.create_task(server.chats().closed_loop(flood(seed), FLOOD))
    long = (LoadRequest(words(random.Random(f"long {seed} {n}"), 1700), 64, user=2) for n in range(6))
    reading = asyncio.create_task(server.client().closed_loop(long, 3))
    await asyncio.sleep(2)
    visiting = await guest(server.client(), seed + 1, flooding.done, 1000)
    await flooding
    return idle, visiting, await reading


def run_queue(args: argparse.Namespace) -> None:
    flags = ("--kv-cache-memory", FEW_BLOCKS)
    with own_server(*flags, users={"flood": 1, "guest": 1, "reader": 1}) as server:
        idle, visiting, reading = asyncio.run(beside_readers(server, args.seed))
    usual, middle, long = (
        statistics.median(each.ttft for each in result.outcomes) for result in (idle, visiting, reading)
    )
    print(
        f"guest's TTFT: idle p50 {1000 * usual:.0f} ms, under the flood and beside prompts that wait for blocks "
        f"{1000 * middle:.0f} ms ({middle / usual:.1f}x); those prompts' {long:.1f} s"
    )


def draw_neighbour(runs: dict[str, tuple[RunResult, RunResult]], file: Path) -> None:
    """For each policy: how long each of the guest's requests waited, over the flood's tokens per second."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panels = plt.subplots(1, len(runs), figsize=(11, 3.4), constrained_layout=True, sharey=True)
    for axes, (policy, (visiting, flooding)) in zip(panels, runs.items(), strict=True):
        arrivals = [at for outcome in flooding.outcomes for at in outcome.arrivals]
        edges = np.arange(0, max(arrivals) + 0.5, 0.5)
        counts, _ = np.histogram(arrivals, bins=edges)
        rates = axes.twinx()
        rates.fill_between(edges[:-1], counts / 0.5, step="post", color="#9db4cc", alpha=0.45)
        rates.set_ylim(0, None)
        if axes is panels[-1]:
            rates.set_ylabel("flood: tokens per second", color="#5f7d99")
        else:
            rates.set_yticklabels([])
        axes.set_zorder(rates.get_zorder() + 1)
        axes.patch.set_visible(False)
        sent = [outcome.sent + 0.2 for outcome in visiting.outcomes]
        axes.scatter(sent, [1000 * outcome.ttft for outcome in visiting.outcomes], s=14, color="#e07b00")
        axes.set_yscale("log")
        axes.set_title(f"--policy {policy}", fontsize=10)
        axes.set_xlabel("seconds after the flood of 128 requests")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("guest: ms to the first token", color="#e07b00")
    figure.savefig(file, dpi=120)


# Weights ------------------------------------------------------------------------------------------------

WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}
LENGTHS = {"one": (16, 180), "two": (500, 24), "four": (120, 80)}
"""Words of prompt and tokens of answer of each user: as different as they come."""


async def backlog(server: OwnServer, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Each user's service before and after `seconds` in which all of them always have requests waiting."""
    load = server.client()
    rng = random.Random(0)
    stop = time.monotonic() + seconds + 20

    async def worker(user: int, prompt: int, answer: int) -> None:
        while time.monotonic() < stop:
            request = LoadRequest(words(rng, round(prompt * rng.uniform(0.5, 1.5))), answer, user=user)
            await load.closed_loop([request], 1)

    workers = [
        asyncio.create_task(worker(user, *LENGTHS[name])) for user, name in enumerate(WEIGHTS) for _ in range(64)
    ]
    await asyncio.sleep(8)  # until all have begun
    before = await server.metrics("carousel_user_service_tokens_total")
    for _ in tqdm(range(round(seconds)), desc="weights 1, 2, 4", unit="s"):
        await asyncio.sleep(1)
    after = await server.metrics("carousel_user_service_tokens_total")
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    return before, after


def run_weights(args: argparse.Namespace) -> None:
    with own_server(users=WEIGHTS) as server:
        before, after = asyncio.run(backlog(server, args.seconds))
    received = {user: after[user] - before[user] for user in WEIGHTS}
    total = sum(received.values())
    print(f"user    weight  prompt words  answer tokens  share of service in {args.seconds:g} s  off by")
    for user, weight in WEIGHTS.items():
        share, fair = received[user] / total, weight / sum(WEIGHTS.values())
        prompt, answer = LENGTHS[user]
        print(f"{user:6} {weight:7g} {prompt:13} {answer:14} {share:28.1%} {share / fair - 1:+7.1%}")


# What fairness costs ------------------------------------------------------------------------------------


def run_cost(args: argparse.Namespace) -> None:
    users = {f"user{number}": 1.0 for number in range(4)}
    rates: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with (
        own_server("--policy", "fair", users=users) as fair,
        own_server("--policy", "fcfs", users=users) as fcfs,
    ):
        servers = {"fair": fair, "fcfs": fcfs}
        for turn in tqdm(range(2 * args.rounds), desc="fair, fcfs", unit="turn"):
            policy = POLICIES[(turn + turn // 2) % 2]  # a, b, b, a, ...
            requests = asked(320, seed=args.seed + turn // 2, num_users=len(users))
            result = asyncio.run(servers[policy].chats().closed_loop(requests, 96))
            rates[policy].append(throughput(result.outcomes))
    for policy, values in rates.items():
        print(
            f"{policy}: {statistics.median(values):.0f} tok/s (of {', '.join(f'{value:.0f}' for value in values)})"
        )
    ratios = [ours / theirs for ours, theirs in zip(rates["fair"], rates["fcfs"], strict=True)]
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"fair / fcfs on the same requests: {statistics.median(ratios):.3f} (of {each})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["neighbour", "weights", "cost", "low", "queue", "scarce"])
    parser.add_argument("--seconds", type=float, default=60, help="weights: how long (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="cost, low: turns of each (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    parser.add_argument(
        "--picture", type=Path, default=Path("docs/neighbour.png"), help="neighbour: (default: docs/neighbour.png)"
    )
    args = parser.parse_args()
    runs = {
        "neighbour": run_neighbour,
        "weights": run_weights,
        "cost": run_cost,
        "low": low.run,
        "queue": run_queue,
        "scarce": scarce.run,
    }
    runs[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
