"""Runs the batches of a server's users, each user's one after the other."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import msgspec
from aiohttp import web

from server.api.chat import understand_chat
from server.api.completions import understand_completion
from server.api.embeddings import understand_embedding
from server.api.generation import Understand, answer_in_background
from server.api.models import check_model
from server.api.responses_api.endpoint import understand_response
from server.app_keys import CONFIG, USERS
from server.batches.lines import Answer, Line
from server.batches.output import Output, split
from server.batches.running import Beside, Counts, run_batch
from server.batches.store import (
    BATCHES,
    LIFETIME_SECONDS,
    Batch,
    RequestCounts,
    StoredFile,
    new_file_id,
)
from server.http.errors import ApiError, told_of
from server.http.json import encode
from server.http.record import RequestRecord
from server.storage import StorageError, insist
from server.users.directory import ANONYMOUS, User

T = TypeVar("T")

MAX_CONCURRENCY = 64

COUNT_SECONDS = 0.5
"""Between two times that a batch's counts are kept."""

GONE_SECONDS = 1.0
"""Between two looks whether a user who may not use the server may again."""

_ACCOUNT = "+batch"
"""No user's name can end so."""

logger = logging.getLogger(__name__)


class _Patiently(Beside):
    """A disk that is full is waited for."""

    async def run(self, task: Callable[[], T]) -> T:
        return await insist(
            f"writing the answers of a batch of {self._user}", lambda: super(_Patiently, self).run(task)
        )


def _endpoint(url: str, user: str) -> tuple[Understand, str]:
    """Who understands what is sent there, and in which field the prompt is."""
    match url:
        case "/v1/chat/completions":
            return understand_chat, "messages"
        case "/v1/completions":
            return understand_completion, "prompt"
        case "/v1/embeddings":
            return understand_embedding, "input"
        case "/v1/responses":
            return partial(understand_response, user), "input"
    raise AssertionError(url)


def owner_of(account: str) -> str:
    """The user whose requests are on an engine's account."""
    return account.removesuffix(_ACCOUNT)


class BatchRunner:
    """The tasks that run batches."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._turns: dict[str, asyncio.Lock] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._concluding: set[str] = set()

    def start(self, user: str, batch: Batch) -> None:
        task = asyncio.create_task(self._run(user, batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    async def stop(self, batch_id: str) -> None:
        """Until it does not run any more. What it has written stays. One that is at its end comes to it."""
        if (task := self._tasks.get(batch_id)) is not None:
            if batch_id not in self._concluding:
                task.cancel()
            await asyncio.wait([task])

    async def stop_all(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, user: str, batch: Batch) -> None:
        async with self._turns.setdefault(user, asyncio.Lock()):
            try:
                await self._answer(user, batch)
                batch.status, batch.completed_at = "completed", int(time.time())
            except Exception:
                logger.exception("the batch %s of %s failed", batch.id, user)
                batch.status, batch.failed_at = "failed", int(time.time())
            self._concluding.add(batch.id)
            try:
                await self.conclude(user, batch)
            finally:
                self._concluding.remove(batch.id)

    async def _answer(self, user: str, batch: Batch) -> None:
        store = self._app[BATCHES]

        async def ask(line: Line) -> Answer:
            return await self._ask(await self._user(user), batch.endpoint, line)

        counts = batch.request_counts

        def tick(_: int) -> None:
            counts.completed = len(output.answered) + len(output.refused) - output.num_failed
            counts.failed = output.num_failed

        assert batch.output_file_id is not None
        source, beside = store.path(batch.input_file_id), _Patiently(store.disk, user)
        counting = asyncio.create_task(self._keep_counts(user, batch))
        try:
            with Output(store.path(batch.output_file_id)) as output, source.open("rb") as file:
                seats = min(MAX_CONCURRENCY, self._app[CONFIG].max_num_seqs)
                await run_batch(file, output, ask, Counts(), beside, concurrency=seats, tick=tick)
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
            with suppress(StorageError):
                await store.keep_batch(user, batch)

    async def _keep_counts(self, user: str, batch: Batch) -> None:
        kept = None
        while True:
            if (now := msgspec.structs.astuple(batch.request_counts)) != kept:
                with suppress(StorageError):  # the next time
                    await self._app[BATCHES].keep_batch(user, batch)
                    kept = now
            await asyncio.sleep(COUNT_SECONDS)

    async def _user(self, name: str) -> User:
        """Who is disabled for a while is waited for, and so is who is not in a file that somebody edits."""
        if self._app[CONFIG].users is None:
            return ANONYMOUS
        while True:
            user = self._app[USERS].named(name)
            if user is not None and not user.disabled:
                return user
            await asyncio.sleep(GONE_SECONDS)

    async def _ask(self, user: User, endpoint: str, line: Line) -> Answer:
        while True:
            record = RequestRecord(uuid.uuid4().hex)
            try:
                if line.url != endpoint:
                    raise ApiError(400, f"the batch is for {endpoint}, not {line.url}", param="url")
                check_model(self._app, line.model)  # nobody is there to see that another answered
                understand, prompt_field = _endpoint(line.url, user.name)
                body = await answer_in_background(
                    self._app,
                    user,
                    user.name + _ACCOUNT,
                    line.body,
                    understand,
                    record,
                    prompt_field=prompt_field,
                )
            except Exception as error:
                told = told_of(error)
                if told is None:
                    raise
                if told.status not in (429, 503):
                    return Answer(told.status, record.request_id, msgspec.Raw(encode(told.body)))
                await asyncio.sleep(float((told.headers or {}).get("Retry-After", "1")))
            else:
                return Answer(200, record.request_id, msgspec.Raw(encode(body)))

    async def conclude(self, user: str, batch: Batch) -> None:
        """Keep how it ended, and its answers and its failures as files. Trouble that passes is waited for."""
        await insist(f"ending the batch {batch.id}", lambda: self._conclude(user, batch))

    async def _conclude(self, user: str, batch: Batch) -> None:
        """May be done again where it failed halfway."""
        store = self._app[BATCHES]
        assert batch.output_file_id is not None
        output = store.path(batch.output_file_id)
        failures = output.with_suffix(".failures")
        if output.exists():
            may_fail = batch.request_counts.failed > 0 and batch.error_file_id is None
            if may_fail and await store.disk.run_pieces(user, split(output, failures)):
                batch.error_file_id = new_file_id()
                failures.replace(store.path(batch.error_file_id))
            if batch.error_file_id is not None:
                await store.keep_file(user, self._file(batch, batch.error_file_id, "error"))
            await store.keep_file(user, self._file(batch, batch.output_file_id, "output"))
        else:
            batch.output_file_id = None
        await store.keep_batch(user, batch)

    def _file(self, batch: Batch, file_id: str, kind: str) -> StoredFile:
        now, size = int(time.time()), self._app[BATCHES].path(file_id).stat().st_size
        name = f"{batch.id}_{kind}.jsonl"
        return StoredFile(file_id, size, now, name, "batch_output", now + LIFETIME_SECONDS)


RUNNER = web.AppKey("batch_runner", BatchRunner)


async def batches_lifetime(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`: what was running goes on where it was."""
    store = app[BATCHES]
    app[RUNNER] = BatchRunner(app)
    beginning = asyncio.create_task(insist("looking for batches that are not done", partial(_begin, app)))
    yield
    beginning.cancel()
    await asyncio.gather(beginning, return_exceptions=True)
    await app[RUNNER].stop_all()
    await store.close()


async def _begin(app: web.Application) -> None:
    store = app[BATCHES]
    await store.forget_old()
    await store.forget_leftovers()
    for user, batch in await store.unfinished():
        app[RUNNER].start(user, batch)


def new_batch(
    endpoint: str, input_file_id: str, window: str, metadata: dict[str, str] | None, total: int
) -> Batch:
    """A batch that is to be started."""
    now = int(time.time())
    return Batch(
        f"batch_{uuid.uuid4().hex}",
        input_file_id,
        endpoint,
        window,
        now,
        now,
        metadata,
        output_file_id=new_file_id(),
        request_counts=RequestCounts(total),
    )
