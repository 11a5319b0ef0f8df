"""Which of transformers' causal models are served exactly: one process a type, each with a tiny random model.

python -m benchmarks.families [TYPE...] [--jobs 2] [--write docs/models.md]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families.check import Found, check
from benchmarks.families.gguf_files import TITLE
from benchmarks.families.page import page

LIMIT_SECONDS = 900.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="by default all of transformers' causal models")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--write", type=Path, help="write the table there, as a page")
    parser.add_argument("--verbose", action="store_true", help="show what the processes say")
    args = parser.parse_args()
    types = args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    found = []
    for number, each in enumerate(sweep(types, args.jobs, verbose=args.verbose), 1):
        found.append(each)
        print(f"{number:3}/{len(types)} {each.model_type:28} {each.verdict:9} {each.path:24} {each.detail[:220]}")
        sys.stdout.flush()
    counts = Counter(each.verdict for each in found)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    if args.write is not None:
        of_gguf = args.write.read_text().partition(TITLE)[1:] if args.write.exists() else ()
        args.write.write_text("\n".join([page(found), "".join(of_gguf)]) if any(of_gguf) else page(found))
    return 1 if counts["wrong"] or counts["crashed"] else 0


def sweep(types: list[str], jobs: int, *, verbose: bool = False) -> Iterator[Found]:
    """As they are done. A process is forked from this one, which has imported all it needs."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(types))
    running: dict[Connection, tuple[str, ForkProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            name = waiting.pop()
            process = context.Process(target=_check, args=(name, theirs, verbose))
            process.start()
            theirs.close()
            running[ours] = (name, process, time.monotonic() + LIMIT_SECONDS)
        ready = wait(list(running), timeout=1.0)
        for connection, (name, process, deadline) in list(running.items()):
            if connection in ready:
                try:
                    yield connection.recv()
                except EOFError:
                    process.join()
                    yield Found(name, "crashed", detail=f"the process ended with {process.exitcode}")
            elif time.monotonic() > deadline:
                yield Found(name, "too slow", detail=f"more than {LIMIT_SECONDS:.0f} s")
            else:
                continue
            process.kill()
            process.join()
            del running[connection]


def _check(name: str, answer: Connection, verbose: bool) -> None:
    logging.disable(logging.NOTSET if verbose else logging.CRITICAL)
    with _quiet(not verbose):
        answer.send(check(name))


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    if wanted:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
    yield


if __name__ == "__main__":
    sys.exit(main())
