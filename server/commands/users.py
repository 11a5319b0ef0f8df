"""`carousel users`: who may use a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from server.users.directory import read_users
from server.users.file import add_user, rotate_key, set_disabled

_SETTINGS = ("weight", "priority")
_LIMITS = {
    "requests_per_minute": "Requests a minute.",
    "tokens_per_minute": "Tokens a minute, of prompts and answers.",
    "max_running": "Sequences that are computed at the same time; others wait.",
    "max_queued": "Requests that wait for their first token at the same time; others are refused.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `carousel users`, each with the function that runs it. They raise `UsersFileError`."""
    actions = parser.add_subparsers(title="commands", dest="action", metavar="COMMAND", required=True)

    def add_action(
        name: str, summary: str, run: Callable[[argparse.Namespace], int], *, named: bool = True
    ) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument("--users", type=Path, metavar="FILE", required=True, help="The users file.")
        if named:
            action.add_argument("name", metavar="NAME", help="Letters, digits, dots, underscores and hyphens.")
        action.set_defaults(run=run)
        return action

    adding = add_action("add", "Add a user, and print the key. Makes the file if it is not there.", _add)
    add_action("list", "List the users.", _list, named=False)
    add_action("disable", "Refuse a user's keys until they are enabled again.", _switch)
    add_action("enable", "Accept a disabled user's keys again.", _switch)
    add_action("rotate", "Give a user a new key in place of all the old ones, and print it.", _rotate)
    adding.add_argument(
        "--weight", type=float, metavar="W", help="Share of the engine, relative to other users'. (default: 1)"
    )
    adding.add_argument(
        "--priority", choices=["high", "normal", "low"], help="Whose requests go before whose. (default: normal)"
    )
    for name, meaning in _LIMITS.items():
        flag = f"--{name.replace('_', '-')}"
        adding.add_argument(flag, type=int, metavar="N", help=f"{meaning} (default: no limit)")


def _add(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if value is not None}
    settings = {name: given[name] for name in _SETTINGS if name in given}
    if limits := {name: given[name] for name in _LIMITS if name in given}:
        settings["limits"] = limits
    key = add_user(args.users, args.name, settings)
    print(f"{args.name} is in {args.users} now. This is the key, shown this once:\n{key}")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    key = rotate_key(args.users, args.name)
    print(f"The old keys of {args.name} work no longer. This is the new one, shown this once:\n{key}")
    return 0


def _switch(args: argparse.Namespace) -> int:
    set_disabled(args.users, args.name, args.action == "disable")
    print(f"{args.name} is {args.action}d.")
    return 0


def _list(args: argparse.Namespace) -> int:
    rows = [("NAME", "WEIGHT", "PRIORITY", "KEYS", "LIMITS")]
    for user in read_users(args.users).values():
        limits = " ".join(f"{name}={value}" for name, value in user.limits if value is not None)
        keys = "disabled" if user.disabled else str(len(user.keys))
        rows.append((user.name, f"{user.weight:g}", user.priority, keys, limits or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
