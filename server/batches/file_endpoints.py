"""`/v1/files`: the inputs and outputs of batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from server.app_keys import CONFIG, user_of
from server.batches.store import (
    BATCHES,
    LIFETIME_SECONDS,
    MAX_FILES,
    Batch,
    BatchStore,
    StoredFile,
    new_file_id,
)
from server.http.errors import ApiError
from server.http.json import json_response

MAX_FILE_BYTES = 200 * 1024 * 1024
"""As in OpenAI's API."""

_CHUNK_BYTES = 64 * 1024
_PURPOSE_BYTES = 128
"""aiohttp reads no fewer than a boundary has, and that may have 70."""

MAX_PAGE = 10_000


class Listing(msgspec.Struct):
    """A page of what there is of a user's."""

    data: Sequence[StoredFile | Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class _Deleted(msgspec.Struct):
    id: str
    object: str = "file"
    deleted: bool = True


def store_of(request: web.Request) -> BatchStore:
    """Raises `ApiError` where nothing is kept."""
    store = request.app.get(BATCHES)
    if store is None:
        message = "files and batches are not kept here: the server has to be started with --batches FOLDER"
        raise ApiError(404, message, code="not_found")
    return store


def page(request: web.Request, found: Sequence[StoredFile | Batch]) -> web.Response:
    """What the query asks for of `found`, which is the newest first: `limit` of them, from `after` on. Raises
    `ApiError`."""
    limit, after = request.query.get("limit", "100"), request.query.get("after")
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise ApiError(400, f"limit should be a number from 1 to {MAX_PAGE}", param="limit")
    if request.query.get("order", "desc") == "asc":
        found = found[::-1]
    if after is not None:
        place = next((place for place, each in enumerate(found, 1) if each.id == after), None)
        if place is None:
            raise ApiError(400, f"after is none of your ids: {after[:100]!r}", param="after")
        found = found[place:]
    data = found[: int(limit)]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return json_response(Listing(data, first, last, len(data) < len(found)))


def find_file(request: web.Request, file_id: str, param: str = "id") -> StoredFile:
    """The caller's file of this id. Raises `ApiError`."""
    for file in store_of(request).files(user_of(request).name):
        if file.id == file_id:
            return file
    raise ApiError(404, f"there is no file {file_id[:100]!r}", param=param, code="not_found")


async def upload_file(request: web.Request) -> web.Response:
    """Raises `ApiError`."""
    store, user = store_of(request), user_of(request).name
    store.forget_old()
    if len(store.files(user)) >= MAX_FILES:
        raise ApiError(400, f"you have {MAX_FILES} files here, as many as there may be: delete some", param="file")
    if not request.content_type.startswith("multipart/form-data"):
        raise ApiError(400, "a file is uploaded as multipart/form-data, with the fields purpose and file")
    file_id = new_file_id()
    kept = False
    try:
        purpose, filename = await _receive(request, store, file_id)
        if purpose != "batch":
            raise ApiError(400, "purpose should be batch", param="purpose")
        if filename is None:
            raise ApiError(400, "file is missing", param="file")
        now, size = int(time.time()), store.path(file_id).stat().st_size
        file = StoredFile(file_id, size, now, filename, "batch", now + LIFETIME_SECONDS)
        store.keep_file(user, file)
        kept = True
    finally:
        if not kept:
            store.path(file_id).unlink(missing_ok=True)
    return json_response(file)


async def _receive(request: web.Request, store: BatchStore, file_id: str) -> tuple[str | None, str | None]:
    """Write the file's content; returns its purpose and its name."""
    purpose = filename = None
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise ApiError(400, "the fields of the form should be purpose and file")
            if part.name == "file":
                filename = (part.filename or "batch.jsonl")[:200]
                await _copy(part, store, file_id, request.app[CONFIG].slow_body_seconds)
            elif part.name == "purpose":
                purpose = (await part.read_chunk(_PURPOSE_BYTES)).decode(errors="replace")
    except (ValueError, HttpProcessingError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from None
    except TimeoutError:
        raise ApiError(408, "the file did not arrive in time", type="timeout", code="body_timeout") from None
    return purpose, filename


async def _copy(part: BodyPartReader, store: BatchStore, file_id: str, seconds: float) -> None:
    size = 0
    with store.path(file_id).open("wb") as file:
        while True:
            async with asyncio.timeout(seconds):
                chunk = await part.read_chunk(_CHUNK_BYTES)
            if not chunk:
                return
            size += len(chunk)
            if size > MAX_FILE_BYTES:
                message = f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB"
                raise ApiError(413, message, param="file", code="body_too_large")
            file.write(chunk)


async def list_files(request: web.Request) -> web.Response:
    files, purpose = store_of(request).files(user_of(request).name), request.query.get("purpose")
    return page(request, [file for file in files if purpose in (None, file.purpose)])


async def get_file(request: web.Request) -> web.Response:
    return json_response(find_file(request, request.match_info["id"]))


async def get_file_content(request: web.Request) -> web.StreamResponse:
    file = find_file(request, request.match_info["id"])
    headers = {"Content-Type": "application/jsonl"}
    return web.FileResponse(store_of(request).path(file.id), headers=headers)


async def delete_file(request: web.Request) -> web.Response:
    file, store = find_file(request, request.match_info["id"]), store_of(request)
    if any(user == user_of(request).name and batch.input_file_id == file.id for user, batch in store.unfinished()):
        raise ApiError(400, "a batch that is not done reads this file: cancel it before", param="id")
    store.forget_file(file.id)
    return json_response(_Deleted(file.id))
