"""`carousel bench`: load-test any OpenAI-compatible server, and report throughput, latency and goodput."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys

import aiohttp
from tqdm import tqdm

from server.bench.load import LoadClient, RunResult
from server.bench.report import Slo, Summary, draw, summarise, table
from server.bench.workload import LoadRequest, WorkloadError, arrival_times, make_requests, read_requests


class BenchError(RuntimeError):
    """The load test cannot run; the message says why."""


def run(args: argparse.Namespace) -> int:
    """Run the load test that the flags describe; returns the exit status: 1 if a request failed."""
    try:
        summaries, results = asyncio.run(asyncio.wait_for(_run(args), args.max_seconds))
    except (BenchError, WorkloadError) as error:
        print(f"carousel bench: {error}", file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"carousel bench: not done after --max-seconds {args.max_seconds:g}", file=sys.stderr)
        return 1
    print(table(summaries))
    errors = [outcome.error for result in results for outcome in result.outcomes if outcome.error is not None]
    if errors:
        print(f"{len(errors)} requests failed, the first with: {errors[0]}", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps([summary.to_json() for summary in summaries], indent=2) + "\n")
    if args.picture is not None:
        draw(summaries, results, args.picture)
    return 1 if errors else 0


async def _run(args: argparse.Namespace) -> tuple[list[Summary], list[RunResult]]:
    model = args.model or await first_model(args.url, args.keys)
    sampling = {"temperature": args.temperature, **({} if args.may_end else {"ignore_eos": True})}
    client = LoadClient(
        args.url, model, endpoint=args.endpoint, keys=args.keys, timeout=args.timeout, sampling=sampling
    )
    slo = Slo(
        ttft=args.slo_ttft_ms / 1000 if args.slo_ttft_ms is not None else None,
        itl=args.slo_itl_ms / 1000 if args.slo_itl_ms is not None else None,
    )
    summaries: list[Summary] = []
    results: list[RunResult] = []
    if args.rate is not None or args.arrivals == "trace":
        requests = _requests(args, args.requests or 64)
        rate = args.rate or math.nan
        times = list(arrival_times(args.arrivals, requests, rate=rate, seed=args.seed))
        load = "trace" if args.arrivals == "trace" else f"{args.arrivals} {args.rate:g}/s"
        with tqdm(total=len(requests), desc=load, unit="request") as bar:
            results.append(await client.open_loop(requests, times, bar))
        summaries.append(summarise(load, results[-1], slo))
        return summaries, results
    for concurrency in args.concurrency:
        requests = _requests(args, args.requests or max(16, 4 * concurrency))
        load = f"C={concurrency}"
        with tqdm(total=len(requests), desc=load, unit="request") as bar:
            results.append(await client.closed_loop(requests, concurrency, bar))
        summaries.append(summarise(load, results[-1], slo))
    return summaries, results


def _requests(args: argparse.Namespace, count: int) -> list[LoadRequest]:
    num_users = max(1, len(args.keys))
    if args.file is not None:
        return read_requests(args.file, num_users=num_users)
    return make_requests(args.workload, count, seed=args.seed, num_users=num_users)


async def first_model(url: str, keys: list[str]) -> str:
    """The first model that the server lists. Raises `BenchError` if there is no such server."""
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.get(url.rstrip("/") + "/v1/models", headers=headers) as response,
        ):
            response.raise_for_status()
            model: str = (await response.json())["data"][0]["id"]
            return model
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
        raise BenchError(
            f"no OpenAI-compatible server answers at {url} ({error}): start one, or give --url"
        ) from error
