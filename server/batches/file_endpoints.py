"""`/v1/files`: the inputs and outputs of batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from server.app_keys import user_of
from server.batches.store import (
    BATCHES,
    LIFETIME_SECONDS,
    MAX_FILES,
    Batch,
    BatchStore,
    StoredFile,
    new_file_id,
)
from server.http.body import Patience, in_time
from server.http.errors import ApiError
from server.http.json import json_response
from server.private import new_private_file
from server.storage import Disk
from server.validation import count_of, printable

MAX_FILE_BYTES = 200 * 1024 * 1024
"""As in OpenAI's API."""

_CHUNK_BYTES = 64 * 1024

RENEWED_AT = 1024 * 1024
"""Bytes of a file for which it gets the time of a body again."""

_FORM_BYTES = 1024 * 1024
"""Of a form besides its file."""

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
    limit, after = count_of(request.query.get("limit", "100"), MAX_PAGE), request.query.get("after")
    if limit is None:
        raise ApiError(400, f"limit should be a number from 1 to {MAX_PAGE}", param="limit")
    if request.query.get("order", "desc") == "asc":
        found = found[::-1]
    if after is not None:
        place = next((place for place, each in enumerate(found, 1) if each.id == after), None)
        if place is None:
            raise ApiError(400, f"after is none of your ids: {after[:100]!r}", param="after")
        found = found[place:]
    data = found[:limit]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return json_response(Listing(data, first, last, len(data) < len(found)))


async def find_file(request: web.Request, file_id: str, param: str = "id") -> StoredFile:
    """The caller's file of this id. Raises `ApiError`."""
    for file in await store_of(request).files(user_of(request).name):
        if file.id == file_id:
            return file
    raise ApiError(404, f"there is no file {file_id[:100]!r}", param=param, code="not_found")


async def upload_file(request: web.Request) -> web.Response:
    """Raises `ApiError`."""
    store, user = store_of(request), user_of(request).name
    if not request.content_type.startswith("multipart/form-data"):
        raise ApiError(400, "a file is uploaded as multipart/form-data, with the fields purpose and file")
    if (request.content_length or 0) > MAX_FILE_BYTES + _FORM_BYTES:
        raise _too_large()
    with store.uploading(user) as num_uploading:
        await store.forget_old()
        if len(await store.files(user)) + num_uploading > MAX_FILES:
            message = f"you have {MAX_FILES} files here, as many as there may be: delete some"
            raise ApiError(400, message, param="file")
        return json_response(await _upload(request, store, user))


async def _upload(request: web.Request, store: BatchStore, user: str) -> StoredFile:
    """Of what does not become a file nothing stays."""
    file_id = new_file_id()
    path = store.path(file_id)
    kept = False
    try:
        with await store.disk.run(user, partial(new_private_file, path)) as content:
            async with in_time(request) as patience:
                form = await _receive(request, Upload(store.disk, user, content, patience))
        if form.purpose != "batch":
            raise ApiError(400, "purpose should be batch", param="purpose")
        if form.filename is None:
            raise ApiError(400, "file is missing", param="file")
        now = int(time.time())
        file = StoredFile(file_id, path.stat().st_size, now, form.filename, "batch", now + LIFETIME_SECONDS)
        await store.keep_file(user, file)
        kept = True
    finally:
        if not kept:  # after what is still being done to it
            await store.disk.run(user, partial(path.unlink, missing_ok=True))
    return file


class _Form(NamedTuple):
    purpose: str | None
    filename: str | None


async def _receive(request: web.Request, upload: Upload) -> _Form:
    """Write the file's content."""
    purpose = filename = None
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise ApiError(400, "the fields of the form should be purpose and file")
            if part.name == "file":
                filename = printable((part.filename or "batch.jsonl")[:200])
                await upload.write(part)
            elif part.name == "purpose":
                purpose = (await part.read_chunk(_PURPOSE_BYTES)).decode(errors="replace")
    except (ValueError, HttpProcessingError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from None
    return _Form(purpose, filename)


class Upload:
    """Takes in a file, beside the event loop."""

    def __init__(self, disk: Disk, user: str, content: BinaryIO, patience: Patience) -> None:
        self._disk = disk
        self._user = user
        self._content = content
        self._patience = patience
        self._size = 0

    async def write(self, part: BodyPartReader) -> None:
        """Raises `ApiError` if it is too large, and `StorageError`."""
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            if self._size // RENEWED_AT != (self._size + len(chunk)) // RENEWED_AT:
                self._patience.renew()
            self._size += len(chunk)
            if self._size > MAX_FILE_BYTES:
                raise _too_large()
            await self._disk.run(self._user, partial(self._append, chunk))

    def _append(self, chunk: bytes) -> None:
        self._content.write(chunk)
        self._content.flush()


def _too_large() -> ApiError:
    message = f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB"
    return ApiError(413, message, param="file", code="body_too_large")


async def list_files(request: web.Request) -> web.Response:
    files, purpose = await store_of(request).files(user_of(request).name), request.query.get("purpose")
    return page(request, [file for file in files if purpose in (None, file.purpose)])


async def get_file(request: web.Request) -> web.Response:
    return json_response(await find_file(request, request.match_info["id"]))


async def get_file_content(request: web.Request) -> web.StreamResponse:
    file = await find_file(request, request.match_info["id"])
    headers = {"Content-Type": "application/jsonl"}
    return web.FileResponse(store_of(request).path(file.id), headers=headers)


async def delete_file(request: web.Request) -> web.Response:
    file, store, caller = (
        await find_file(request, request.match_info["id"]),
        store_of(request),
        user_of(request).name,
    )
    if any(user == caller and batch.input_file_id == file.id for user, batch in await store.unfinished()):
        raise ApiError(400, "a batch that is not done reads this file: cancel it before", param="id")
    await store.forget_file(caller, file.id)
    return json_response(_Deleted(file.id))
