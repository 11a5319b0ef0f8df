"""`carousel bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.bench.workload import WORKLOADS
from server.commands.keys import add_key_file, keys_of

LOOPBACK = "http://127.0.0.1:8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel bench`, and the function that runs it."""
    parser.usage = "carousel bench [options]"
    target = parser.add_argument_group("the server")
    target.add_argument("--url", default=LOOPBACK, help=f"server to load (default: {LOOPBACK})")
    target.add_argument("--model", help="model to ask for (default: the first that the server lists)")
    target.add_argument(
        "--endpoint", choices=["completions", "chat"], default="completions", help="(default: completions)"
    )
    add_key_file(target, "file with the users' keys, one a line")
    work = parser.add_argument_group("the requests")
    work.add_argument(
        "--workload",
        choices=list(WORKLOADS),
        default="chat",
        help="lengths of prompts and answers (default: chat)",
    )
    work.add_argument(
        "--file", type=Path, metavar="JSONL", help="requests from a file instead: prompt, max_tokens, ..."
    )
    work.add_argument(
        "--requests", type=int, metavar="N", help="how many, at each load (default: 4 per seat, at least 16)"
    )
    work.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    work.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of the answers (default: 0)")
    work.add_argument(
        "--may-end",
        action="store_true",
        help="answers end where the model ends them (default: they have the wanted length)",
    )
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--concurrency",
        type=_numbers,
        default=[1, 8, 32],
        metavar="N,N,...",
        help="closed loop: requests in flight, one run each (default: 1,8,32)",
    )
    load.add_argument("--rate", type=float, metavar="R", help="open loop instead: R requests a second")
    load.add_argument(
        "--arrivals",
        choices=["poisson", "bursty", "constant", "trace"],
        default="poisson",
        help="open loop: how requests arrive; trace takes the file's timestamps (default: poisson)",
    )
    load.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="give up on a request (default: 300 s)"
    )
    load.add_argument(
        "--max-seconds", type=float, default=600, metavar="S", help="bound on the whole test (default: 600)"
    )
    report = parser.add_argument_group("the report")
    report.add_argument(
        "--slo-ttft-ms", type=float, metavar="MS", help="goodput counts requests with TTFT up to this"
    )
    report.add_argument("--slo-itl-ms", type=float, metavar="MS", help="and with a mean ITL up to this")
    report.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    report.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw throughput against latency, and a timeline"
    )
    parser.set_defaults(run=_run)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on, with commas between them, not {text!r}")
    return numbers


def _run(args: argparse.Namespace) -> int:
    from server.bench.run import run

    args.keys = keys_of(args)
    return run(args)
