"""`carousel top`."""

from __future__ import annotations

import argparse

from server.commands.bench import LOOPBACK
from server.commands.ending import complain, run_until_signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel top`, and the function that runs it."""
    parser.usage = "carousel top [options]"
    parser.add_argument("--url", default=LOOPBACK, help=f"(default: {LOOPBACK})")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="Seconds from one look to the next. (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="Look for one interval, print the picture, and leave.")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from server.terminal import TopError, top

    try:
        run_until_signal(top(args.url, args.interval, once=args.once))
    except TopError as error:
        return complain(args, str(error))
    return 0
