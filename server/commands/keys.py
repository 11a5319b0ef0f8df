"""Users' keys for commands that ask a server: from a file or from the environment, for whoever lists the processes
of a machine reads their command lines."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

VARIABLE = "CAROUSEL_KEY"


def add_key_file(group: argparse._ArgumentGroup, help: str) -> None:
    """The flag that `keys_of` looks at."""
    group.add_argument(
        "--key-file", type=_keys_in, metavar="FILE", help=f"{help} (default: the environment's {VARIABLE})"
    )


def keys_of(args: argparse.Namespace) -> list[str]:
    """Those that are given, in their order; often none."""
    keys: list[str] = args.key_file or []
    if not keys and (key := os.environ.get(VARIABLE, "").strip()):
        return [key]
    return keys


def _keys_in(name: str) -> list[str]:
    try:
        return Path(name).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {error}") from None
