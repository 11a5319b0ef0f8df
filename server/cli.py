"""The `carousel` command. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from benchmarks import flags as bench_flags
from scheduler.config import ConfigFileError, EngineConfig
from scheduler.logs import configure
from scheduler.request import InvalidRequestError, SamplingParams
from server import usage_command, users_command
from server.config import ServeConfig
from server.flags import ConfigFlags, problems
from server.ledger import LedgerError
from server.users import UsersFileError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses, besides 0; the last is the shell's for a Ctrl-C."""

_PRECEDENCE = """\
An option is also an environment variable (--block-size: CAROUSEL_BLOCK_SIZE) and a line of the YAML file that
--config names (block_size: 16). A flag wins over the environment, the environment over the file.
"""


_BENCH = "Load-test any OpenAI-compatible server: throughput, latency, goodput."
_TOP = "Watch a running server in the terminal: seats, blocks, speed, users."
_USERS = "Say who may use a server: add, list, disable and enable users, and give them new keys."
_USAGE = "Tell who used how much on which day."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The result is its exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except ValidationError as error:
        return _complain(args, *problems(error), status=WRONG_USAGE)
    except InvalidRequestError as error:
        return _complain(args, str(error), status=WRONG_USAGE)
    except (ConfigFileError, UsersFileError, LedgerError) as error:
        return _complain(args, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader left first, as in `carousel generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="carousel",
        description="Continuous batching of language models, for several people who share one machine.",
        epilog="carousel COMMAND --help explains a command and its options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"carousel {version('carousel')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_serve(_add_command(commands, "serve", "Serve a model over HTTP, with OpenAI's API."))
    _add_generate(_add_command(commands, "generate", "Answer one prompt on the terminal."))
    _add_bench(commands.add_parser("bench", help=_BENCH, description=_BENCH, allow_abbrev=False))
    _add_top(commands.add_parser("top", help=_TOP, description=_TOP, allow_abbrev=False))
    users_command.add_arguments(commands.add_parser("users", help=_USERS, description=_USERS, allow_abbrev=False))
    usage_command.add_arguments(commands.add_parser("usage", help=_USAGE, description=_USAGE, allow_abbrev=False))
    return parser


def _add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=_PRECEDENCE,
        allow_abbrev=False,
    )
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.usage = "carousel serve [options]"
    flags = ConfigFlags(parser, ServeConfig)

    def run(args: argparse.Namespace) -> int:
        config = flags.read(args)
        configure(config.log_level.upper(), config.log_format)
        from scheduler.async_engine import EngineStartError
        from server.otel import OtelMissingError
        from server.serve import CannotListenError, serve

        try:
            _run_until_signal(serve(config))
        except (EngineStartError, CannotListenError, OtelMissingError) as error:
            return _complain(args, str(error))
        return 0

    parser.set_defaults(run=run)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'carousel generate [options] "prompt"'
    parser.add_argument("prompt", help="What to answer, or with --raw to continue.")
    parser.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it is, without the model's chat template."
    )
    sampling = parser.add_argument_group("sampling options")
    sampling.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="Longest answer, in tokens. (default: 256)"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token each time; 1 draws as the model would. (default: 0)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="Draw from the likeliest tokens whose probabilities sum to this. (default: 1)",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="With a seed, the same answer each time.")
    flags = ConfigFlags(parser, EngineConfig)

    def run(args: argparse.Namespace) -> int:
        config = flags.read(args)
        params = SamplingParams(
            max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
        )
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        from scheduler.async_engine import EngineDeadError, EngineStartError
        from server.generate import generate

        try:
            finished = _run_until_signal(generate(config, args.prompt, params, raw=args.raw))
        except (EngineStartError, EngineDeadError) as error:
            return _complain(args, str(error))
        return 0 if finished else INTERRUPTED

    parser.set_defaults(run=run)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.usage = "carousel bench [options]"
    bench_flags.add_arguments(parser)

    def run(args: argparse.Namespace) -> int:
        from benchmarks import bench

        return bench.run(args)

    parser.set_defaults(run=run)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.usage = "carousel top [options]"
    parser.add_argument("--url", default=bench_flags.LOOPBACK, help=f"(default: {bench_flags.LOOPBACK})")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="Seconds from one look to the next. (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="Look for one interval, print the picture, and leave.")

    def run(args: argparse.Namespace) -> int:
        from server.top import TopError, top

        try:
            _run_until_signal(top(args.url, args.interval, once=args.once))
        except TopError as error:
            return _complain(args, str(error))
        return 0

    parser.set_defaults(run=run)


def _run_until_signal(coroutine: Coroutine[Any, Any, None]) -> bool:
    """Run it to its end: True. Ctrl-C or SIGTERM cancels it: False. A second one kills at once."""

    async def run() -> bool:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(coroutine)

        def interrupt() -> None:
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
            task.cancel()

        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, interrupt)
        try:
            await task
        except asyncio.CancelledError:
            return False
        return True

    return asyncio.run(run())


def _complain(args: argparse.Namespace, *lines: str, status: int = FAILED) -> int:
    for line in lines:
        print(f"carousel {args.command}: {line}", file=sys.stderr)
    return status
