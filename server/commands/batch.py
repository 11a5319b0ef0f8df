"""`carousel batch`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.ending import FAILED, INTERRUPTED, complain, run_until_signal
from server.commands.flags import ConfigFlags
from server.config import ServeConfig

if TYPE_CHECKING:
    from server.batches.running import Counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel batch`, and the function that runs it."""
    parser.usage = "carousel batch IN.jsonl OUT.jsonl [options]"
    parser.add_argument("source", type=Path, metavar="IN.jsonl", help="the requests: OpenAI's batch file")
    parser.add_argument(
        "target", type=Path, metavar="OUT.jsonl", help="the answers; what is there already is not asked again"
    )
    parser.add_argument(
        "--url", help="send them to this server; by default one is started for the batch, with the options below"
    )
    parser.add_argument("--key", help="the key to send along")
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="requests in flight (default: one for each seat)"
    )
    flags = ConfigFlags(parser, ServeConfig)
    parser.set_defaults(run=lambda args: _run(args, flags))


def _run(args: argparse.Namespace, flags: ConfigFlags[ServeConfig]) -> int:
    config = flags.read(args)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from scheduler.engine.client import EngineStartError
    from server.batches.lines import NoAnswerFileError
    from server.batches.running import ServerGoneError

    counts: list[Counts] = []
    try:
        finished = run_until_signal(_batch(args, config, counts))
    except (EngineStartError, ServerGoneError, NoAnswerFileError, OSError) as error:
        return complain(args, str(error))
    if not finished:
        return INTERRUPTED
    (done,) = counts
    print(f"{done.answered} answered, {done.failed} failed, {done.skipped} of them before this run")
    return FAILED if done.failed else 0


async def _batch(args: argparse.Namespace, config: ServeConfig, counts: list[Counts]) -> None:
    from tqdm import tqdm

    from server.batches.running import run_batch
    from server.serving import served

    with args.source.open("rb") as lines:
        num_lines = sum(1 for line in lines if line.strip())
    concurrency = args.concurrency or config.max_num_seqs

    async def run(url: str) -> None:
        with tqdm(total=num_lines, unit="line") as bar:
            done = await run_batch(
                args.source, args.target, url=url, key=args.key, concurrency=concurrency, bar=bar
            )
        counts.append(done)

    if args.url is not None:
        await run(args.url.rstrip("/"))
    else:
        own = config.model_copy(update={"host": "127.0.0.1", "port": 0, "access_log": False, "users": None})
        async with served(own) as served_at:
            await run(served_at.url)
