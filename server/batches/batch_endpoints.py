"""`/v1/batches`."""

from __future__ import annotations

import time
from typing import Literal

from aiohttp import web

from server.api.fields import CheckedBody
from server.api.reading import read
from server.app_keys import user_of
from server.batches.file_endpoints import find_file, page, store_of
from server.batches.runner import RUNNER, new_batch
from server.batches.running import count_requests
from server.batches.store import UNFINISHED, Batch
from server.http.body import body_of
from server.http.errors import ApiError
from server.http.json import json_response
from server.http.record import record_of

MAX_UNFINISHED = 20
"""Batches of one user."""

MAX_REQUESTS, MAX_LINES = 50_000, 1_000_000
"""Of one batch, as in OpenAI's API; and lines of its file, with blank ones."""


class BatchRequest(CheckedBody):
    input_file_id: str
    """The file of requests."""
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    """Where they would have been sent."""
    completion_window: Literal["24h"]
    """How long they may take."""
    metadata: dict[str, str] | None = None
    """Is in the batch again."""


async def create_batch(request: web.Request) -> web.Response:
    """Raises `ApiError` and `pydantic.ValidationError`."""
    store, user = store_of(request), user_of(request).name
    async with body_of(request) as content_of_body:
        body = read(request.app, record_of(request), content_of_body, BatchRequest)
    file = await find_file(request, body.input_file_id, "input_file_id")
    with store.path(file.id).open("rb") as content:
        total = await store.disk.run_pieces(user, count_requests(content, MAX_REQUESTS, MAX_LINES))
    if total is None:
        message = f"the file has more than {MAX_REQUESTS} requests, or more than {MAX_LINES} lines: divide it"
        raise ApiError(400, message, param="input_file_id", code="too_many_requests_in_batch")
    batch = new_batch(body.endpoint, file.id, body.completion_window, body.metadata, total)
    if not await store.add_batch(user, batch, MAX_UNFINISHED):
        raise ApiError(400, f"{MAX_UNFINISHED} of your batches are not done yet, as many as there may be")
    request.app[RUNNER].start(user, batch)
    return json_response(batch)


async def _found(request: web.Request) -> Batch:
    batch_id = request.match_info["id"]
    for batch in await store_of(request).batches(user_of(request).name):
        if batch.id == batch_id:
            return batch
    raise ApiError(404, f"there is no batch {batch_id[:100]!r}", code="not_found")


async def get_batch(request: web.Request) -> web.Response:
    return json_response(await _found(request))


async def list_batches(request: web.Request) -> web.Response:
    return page(request, await store_of(request).batches(user_of(request).name))


async def cancel_batch(request: web.Request) -> web.Response:
    """What is answered by then stays in the output."""
    runner = request.app[RUNNER] if (await _found(request)).status in UNFINISHED else None
    if runner is not None:
        await runner.stop(request.match_info["id"])
    batch = await _found(request)  # it may have ended meanwhile
    if batch.status in UNFINISHED:
        batch.status, batch.cancelled_at = "cancelled", int(time.time())
        batch.cancelling_at = batch.cancelled_at
        await request.app[RUNNER].conclude(user_of(request).name, batch)
    return json_response(batch)
