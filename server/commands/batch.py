"""`carousel batch`: a file of requests, answered into another file."""

from __future__ import annotations

import argparse
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.config import EngineConfig
from server.commands.ending import FAILED, INTERRUPTED, complain, run_until_signal
from server.commands.flags import ConfigFlags
from server.commands.keys import add_key_file, keys_of

if TYPE_CHECKING:
    from server.batches.output import Output
    from server.batches.running import Counts

_CHUNK_BYTES = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel batch`, and the function that runs it."""
    parser.usage = "carousel batch [options] IN.jsonl OUT.jsonl"
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="Requests, in OpenAI's form of a batch.")
    parser.add_argument(
        "output", type=Path, metavar="OUT.jsonl", help="Answers; what is in it already is not asked again."
    )
    target = parser.add_argument_group("batch options")
    target.add_argument("--url", help="Send to this server, in place of an engine of one's own.")
    add_key_file(target, "File with the user's key there.")
    target.add_argument(
        "--concurrency", type=_count, metavar="N", help="Lines in flight. (default: one for each seat)"
    )
    flags = ConfigFlags(parser, EngineConfig)
    parser.set_defaults(run=lambda args: _run(args, flags))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, not {text!r}")
    return int(text)


def _run(args: argparse.Namespace, flags: ConfigFlags[EngineConfig]) -> int:
    config = flags.read(args)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from scheduler.client.async_engine import EngineStartError
    from scheduler.client.handle import abandon_engines
    from server.batches.client import ServerGoneError
    from server.batches.output import Output, OutputError
    from server.batches.running import Counts
    from server.serving import CannotListenError
    from server.storage import StorageError

    counts = Counts()
    try:
        if args.output.exists() and args.output.samefile(args.input):
            return complain(args, f"{args.output} is the input: the answers need a file of their own")
        total = _count_lines(args.input)
        with Output(args.output) as output:
            finished = run_until_signal(_answer(args, config, output, counts, total), abandon_engines)
            print(f"{counts.answered} answered, {counts.failed} failed, {counts.skipped} skipped", flush=True)
    except OSError as error:
        return complain(args, f"{error.filename or args.input}: {error.strerror}")
    except (ServerGoneError, StorageError) as error:
        left = f"{counts.answered} answered, {counts.failed} failed, {counts.skipped} skipped"
        return complain(args, str(error), f"{left}; the same command goes on from here")
    except (EngineStartError, CannotListenError, OutputError) as error:
        return complain(args, str(error))
    if not finished:
        return INTERRUPTED
    return FAILED if output.num_failed else 0


def _count_lines(path: Path) -> int:
    """How many lines end; about as many as there are."""
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))


async def _answer(
    args: argparse.Namespace, config: EngineConfig, output: Output, counts: Counts, total: int
) -> None:
    """Run the batch on the server that `args` names, or on one of its own. Raises `EngineStartError`,
    `ServerGoneError` and `CannotListenError`."""
    from tqdm import tqdm

    from server.batches.client import batch_client
    from server.batches.running import Beside, run_batch
    from server.config import ServeConfig
    from server.serving import served
    from server.storage import Disk

    concurrency = args.concurrency or config.max_num_seqs
    async with AsyncExitStack() as stack:
        url = args.url
        if url is None:
            knobs = {name: getattr(config, name) for name in EngineConfig.model_fields}
            url = (await stack.enter_async_context(served(ServeConfig(**knobs, port=0, access_log=False)))).url
        client = await stack.enter_async_context(
            batch_client(url, next(iter(keys_of(args)), None), concurrency=concurrency)
        )
        file = stack.enter_context(args.input.open("rb"))
        bar = stack.enter_context(tqdm(total=total, unit="line"))
        disk = Disk(args.output.name)
        stack.push_async_callback(disk.close)
        beside = Beside(disk, "")
        await run_batch(file, output, client.ask, counts, beside, concurrency=concurrency, tick=bar.update)
