"""Runs a batch: what is not answered yet goes out, so many lines at a time, and the answers into the output."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from server.batches.lines import (
    Answer,
    BadLineError,
    Line,
    LineError,
    OutputLine,
    id_of,
    numbered_lines,
    read_line,
)
from server.batches.output import Output

Ask = Callable[[Line], Awaitable[Answer]]


@dataclass(slots=True)
class Counts:
    """Lines of the input, by what became of them in this run."""

    answered: int = 0
    """With status 200."""
    failed: int = 0
    """With another status, or with an error in place of a response."""
    skipped: int = 0
    """They were in the output before."""


async def run_batch(
    file: BinaryIO, output: Output, ask: Ask, counts: Counts, *, concurrency: int, tick: Callable[[], object]
) -> None:
    """Answer the lines of `file` that the output has not, with up to `concurrency` in flight. `tick` is called
    for each line that is done with. What `ask` raises ends the run, and leaves the lines in flight to be done."""
    lines = _to_do(file, output, counts, tick)

    async def work() -> None:
        for line in lines:  # all workers take from the same iterator
            answer = await ask(line)
            output.write(OutputLine(id_of(line.number), line.custom_id, response=answer))
            if answer.status_code == 200:
                counts.answered += 1
            else:
                counts.failed += 1
            tick()

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _to_do(file: BinaryIO, output: Output, counts: Counts, tick: Callable[[], object]) -> Iterator[Line]:
    """The lines to ask. Those that cannot be asked get their error on the way."""
    seen: set[str] = set()
    done_before = frozenset(output.answered)
    for number, content in numbered_lines(file):
        if id_of(number) in output.refused:
            counts.skipped += 1
            tick()
            continue
        try:
            line = read_line(number, content)
            if line.custom_id in seen:
                message = f"line {number}: an earlier line has the custom_id {line.custom_id!r}"
                raise BadLineError("duplicate_custom_id", message, line.custom_id)
        except BadLineError as error:
            reason = LineError(error.code, str(error))
            output.write(OutputLine(id_of(number), error.custom_id, error=reason))
            counts.failed += 1
            tick()
            continue
        seen.add(line.custom_id)
        if line.custom_id in done_before:
            counts.skipped += 1
            tick()
            continue
        yield line
