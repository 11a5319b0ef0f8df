"""Sends the lines of a batch to a server, so many at a time, until each has an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import aiohttp
import msgspec

from server.batches.lines import Answered, AnswerFile, Asked, HttpAnswer, line_id, read_requests

PATIENCE_SECONDS = 60.0
"""How long a line waits between two tries where the server has too much to do, at most."""


class ServerGoneError(RuntimeError):
    """Nobody answers there; what is answered is in the file, and the batch can be resumed."""


class Bar(Protocol):
    """A progress bar: tqdm's."""

    def update(self) -> object: ...


class Counts(NamedTuple):
    """Of the lines of the input."""

    answered: int
    """With status 200."""
    failed: int
    skipped: int
    """Those that an earlier run had answered, among both."""


async def run_batch(
    source: Path, target: Path, *, url: str, key: str | None, concurrency: int, bar: Bar
) -> Counts:
    """Answer each line of `source` once, in `target`. Raises `ServerGoneError` and OSError."""
    answers = AnswerFile(target)
    skipped = 0
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=concurrency)

    def lines() -> Iterator[Asked | Answered]:
        nonlocal skipped
        for line in read_requests(source):
            if line.custom_id in answers.done:
                skipped += 1
                bar.update()
            else:
                yield line

    queue = lines()

    async def worker(session: aiohttp.ClientSession) -> None:
        for line in queue:
            answers.write(line if isinstance(line, Answered) else await _answer(session, url, line))
            bar.update()

    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as workers,
        ):
            for _ in range(concurrency):
                workers.create_task(worker(session))
    except* ServerGoneError as errors:
        raise ServerGoneError(str(errors.exceptions[0])) from errors
    finally:
        answers.close()
    return Counts(len(answers.done) - answers.num_failed, answers.num_failed, skipped)


async def _answer(session: aiohttp.ClientSession, url: str, line: Asked) -> Answered:
    """Again, as long as the server has too much to do."""
    while True:
        try:
            async with session.post(
                url + line.url, data=bytes(line.body), headers={"Content-Type": "application/json"}
            ) as response:
                body = await response.read()
                if response.status in (429, 503):
                    await asyncio.sleep(_wait(response.headers.get("Retry-After", "")))
                    continue
                request_id = response.headers.get("X-Request-Id", "")
        except aiohttp.ClientConnectionError as error:
            raise ServerGoneError(f"{url} does not answer ({error}): run the command again to go on") from error
        try:
            content = msgspec.json.decode(body, type=msgspec.Raw)
        except msgspec.MsgspecError:  # a stream, which has no place in a line
            return Answered.with_problem(
                line.custom_id, "not_json", "the answer is no JSON: was a stream asked for?"
            )
        return Answered(line_id(), line.custom_id, HttpAnswer(response.status, request_id, content), None)


def _wait(retry_after: str) -> float:
    return min(PATIENCE_SECONDS, float(retry_after)) if retry_after.isdecimal() else 1.0
