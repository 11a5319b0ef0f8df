"""The same measurement in a process for each instruction set: torch can only be held to one before it starts."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from scheduler.machine.processor import VARIABLE, available


def add_cpu_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu",
        nargs="+",
        choices=available(),
        default=available(),
        metavar="NAME",
        help=f"builds to take, of {', '.join(available())} (default: all that this processor runs)",
    )


def in_each_build(module: str, cpus: Sequence[str], arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What `python -m module` prints as JSON with these arguments, for each build in turn."""
    for number, cpu in enumerate(cpus, 1):
        print(f"{cpu} ({number} of {len(cpus)})", file=sys.stderr, flush=True)
        yield cpu, in_build(module, cpu, arguments)


def print_tables(module: str, cpus: Sequence[str], arguments: Sequence[str], *, model: str, what: str) -> None:
    """A Markdown table for each build in turn, of the rows that `python -m module` prints as JSON: objects whose
    keys are the table's head."""
    for cpu, rows in in_each_build(module, cpus, arguments):
        print(f"\n{model}, {cpu}: {what}\n")
        for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)):
            print("| " + " | ".join(map(str, cells)) + " |")


def in_build(module: str, cpu: str | None, arguments: Sequence[str]) -> Any:
    """The same for one build; None: this processor's own. Raises `CalledProcessError`."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if cpu is not None:
        environment[VARIABLE] = cpu
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])
