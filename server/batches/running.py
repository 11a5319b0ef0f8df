"""Runs a batch: what is not answered yet goes out, so many lines at a time, and the answers into the output."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, TypeVar

from scheduler.shared_thread import Pieces
from server.batches.lines import (
    Answer,
    BadLineError,
    Line,
    LineError,
    OutputLine,
    id_of,
    is_blank,
    numbered_lines,
    read_line,
)
from server.batches.output import Output
from server.storage import Disk

Ask = Callable[[Line], Awaitable[Answer]]

BAD_AT_ONCE = 1000
"""Lines that get their errors together."""

T = TypeVar("T")


class Beside:
    """Does beside the event loop what a user's batch waits for."""

    def __init__(self, disk: Disk, user: str) -> None:
        self._disk = disk
        self._user = user

    async def run(self, task: Callable[[], T]) -> T:
        """Something short, which may be tried again. Raises `StorageError`."""
        return await self._disk.run(self._user, task)

    async def run_pieces(self, pieces: Pieces[T]) -> T:
        """Something long, which others can come between. Raises `StorageError`."""
        return await self._disk.run_pieces(self._user, pieces)


@dataclass(slots=True)
class Counts:
    """Lines of the input, by what became of them in this run."""

    answered: int = 0
    """With status 200."""
    failed: int = 0
    """With another status, or with an error in place of a response."""
    skipped: int = 0
    """They were in the output before."""

    @property
    def total(self) -> int:
        return self.answered + self.failed + self.skipped


async def run_batch(
    file: BinaryIO,
    output: Output,
    ask: Ask,
    counts: Counts,
    beside: Beside,
    *,
    concurrency: int,
    tick: Callable[[int], object],
) -> None:
    """Answer the lines of `file` that the output has not, with up to `concurrency` in flight. `tick` is called
    with the number of lines that are done with. What `ask` raises ends the run, and leaves the lines in flight to
    be done. Raises `OutputError`, and what `beside` does."""
    await beside.run_pieces(output.read())
    found = _to_do(file, output)
    ready: deque[Line] = deque()
    reading = asyncio.Lock()

    async def next_line() -> Line | None:
        async with reading:  # all workers take from the same lines
            while not ready:
                num_done = counts.total
                read = await beside.run_pieces(_read(found, concurrency))
                if read.bad:
                    await beside.run(partial(output.write, read.bad))
                counts.failed += len(read.bad)
                counts.skipped += read.num_skipped
                tick(counts.total - num_done)
                ready.extend(read.good)
                if read.is_last and not ready:
                    return None
            return ready.popleft()

    async def work() -> None:
        while (line := await next_line()) is not None:
            answer = await ask(line)
            said = OutputLine(id_of(line.number), line.custom_id, response=answer)
            await beside.run(partial(output.write, [said]))
            if answer.status_code == 200:
                counts.answered += 1
            else:
                counts.failed += 1
            tick(1)

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await beside.run(lambda: None)  # after what is being written: the files are closed then


@dataclass(slots=True)
class _Read:
    """Some lines of the input."""

    good: list[Line]
    bad: list[OutputLine]
    num_skipped: int = 0
    is_last: bool = False


def _read(found: Iterator[Line | OutputLine | bool], number: int) -> Pieces[_Read]:
    """The next `number` lines to ask, and what is found on the way to them."""
    read = _Read([], [])
    for each in found:
        match each:
            case Line():
                read.good.append(each)
            case OutputLine():
                read.bad.append(each)
            case is_skipped:
                read.num_skipped += is_skipped
        if len(read.good) == number or len(read.bad) == BAD_AT_ONCE:
            return read
        yield
    read.is_last = True
    return read


def _to_do(file: BinaryIO, output: Output) -> Iterator[Line | OutputLine | bool]:
    """Of each line what to ask, or why it cannot be asked; or whether it is skipped for having been done, and not
    for being blank."""
    seen: set[str] = set()
    done_before, refused_before = frozenset(output.answered), frozenset(output.refused)
    for number, content in numbered_lines(file):
        if is_blank(content):
            yield False
            continue
        if id_of(number) in refused_before:
            yield True
            continue
        try:
            line = read_line(number, content)
            if line.custom_id in seen:
                message = f"line {number}: an earlier line has the custom_id {line.custom_id!r}"
                raise BadLineError("duplicate_custom_id", message, line.custom_id)
        except BadLineError as error:
            reason = LineError(error.code, str(error))
            yield OutputLine(id_of(number), error.custom_id, error=reason)
            continue
        seen.add(line.custom_id)
        yield True if line.custom_id in done_before else line


def count_requests(file: BinaryIO, most: int, most_lines: int) -> Pieces[int | None]:
    """How many lines are not blank; None if they are more than `most`, or if there are more than `most_lines`."""
    count = 0
    for number, content in numbered_lines(file):
        count += not is_blank(content)
        if count > most or number > most_lines:
            return None
        yield
    return count
