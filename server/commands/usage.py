"""`carousel usage`: what a ledger says, as a table or as JSON."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import msgspec

from server.config import ledger_of
from server.users.ledger import Amounts, DayUsage, read_ledger, total

_COLUMNS = ("USER", "DAY", "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "ENGINE s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel usage`, and the function that runs it, which raises `LedgerError`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ledger", type=Path, metavar="FILE", help="The ledger of a server.")
    source.add_argument("--users", type=Path, metavar="FILE", help="A users file: the ledger next to it.")
    parser.add_argument("--user", metavar="NAME", help="Only this user's.")
    parser.add_argument("--since", type=_day, metavar="YYYY-MM-DD", help="Only this day (UTC) and later.")
    parser.add_argument("--json", action="store_true", help="For programs.")
    parser.set_defaults(run=_run)


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a day like 2026-03-01, got {text!r}") from None


def _run(args: argparse.Namespace) -> int:
    days = read_ledger(args.ledger or ledger_of(args.users), args.user, args.since or "")
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(days)).decode())
    else:
        _print_table(days)
    return 0


def _print_table(days: list[DayUsage]) -> None:
    """One line for each user and day, and the sum of all. Names to the left, numbers to the right."""
    rows = [_COLUMNS, *((day.user, day.day, *_numbers(day)) for day in days), ("all", "", *_numbers(total(days)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells))


def _numbers(amounts: Amounts) -> tuple[str, str, str, str, str]:
    return (
        str(amounts.requests),
        str(amounts.prompt_tokens),
        str(amounts.cached_tokens),
        str(amounts.completion_tokens),
        f"{amounts.engine_seconds:.1f}",
    )
