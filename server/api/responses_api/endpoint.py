"""POST /v1/responses, and those that were kept."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web

from scheduler.sampling_params import InvalidRequestError
from server.api.conversation import understand
from server.api.generation import Asked, Wanted, answer
from server.api.models import longest_sequence
from server.api.reading import read
from server.api.responses_api.answers import Response
from server.api.responses_api.request import Json, ResponsesRequest
from server.api.responses_api.store import RESPONSES, ResponseStore, Stored
from server.api.responses_api.wording import ResponsesWording
from server.api.shape import LIST, OBJECT, TEXT, TEXT_OR_LIST, check_fields
from server.app_keys import ENGINE, user_of
from server.http.errors import ApiError
from server.http.json import encode, json_response
from server.http.record import RequestRecord

NOT_KEPT = "responses are not kept here: the server has to be started with --store FILE"


class Deleted(msgspec.Struct, frozen=True):
    id: str
    object: str = "response"
    deleted: bool = True


async def create_response(request: web.Request) -> web.StreamResponse:
    return await answer(request, partial(understand_response, user_of(request).name), prompt_field="input")


def understand_response(user: str, app: web.Application, record: RequestRecord, content: bytes) -> Asked | Wanted:
    """Raises whatever is wrong with the request. May be called in a thread."""
    long = {"input": TEXT_OR_LIST, "instructions": TEXT, "tools": LIST, "text": OBJECT}
    check_fields(content, ResponsesRequest, long, longest_sequence(app[ENGINE].info))
    body = read(app, record, content, ResponsesRequest)
    store = app.get(RESPONSES)
    if store is None and body.store:
        raise InvalidRequestError(NOT_KEPT, "store")
    asked = partial(_asked, user, app, body)
    if body.previous_response_id is None:
        return asked([])
    if store is None:
        raise InvalidRequestError(NOT_KEPT, "previous_response_id")
    return Wanted(partial(_items_before, store, user, body.previous_response_id), asked)


def _asked(user: str, app: web.Application, body: ResponsesRequest, before: list[Json]) -> Asked:
    """`before`: what was said up to this request."""
    store = app.get(RESPONSES)
    conversation = understand(app, body.as_chat(before))
    is_stored = store is not None and body.store is not False

    def keep(response: Response) -> None:
        if is_stored and store is not None:
            content = encode(response)
            said = msgspec.json.decode(content)["output"]  # logprobs are JSON already
            store.keep(response.id, user, content, [*before, *body.items, *said])

    wording = ResponsesWording(app[ENGINE].tokenizer, body, conversation, is_stored=is_stored, on_end=keep)
    return Asked(conversation.body, [conversation.prompt], conversation.params, wording, conversation.form)


async def _items_before(store: ResponseStore, user: str, previous: str) -> list[Json]:
    found = await store.find(previous, user)
    if found is None:
        raise ApiError(
            404,
            f"there is no response {previous[:100]!r}",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found.items


async def get_response(request: web.Request) -> web.Response:
    return web.Response(body=(await _found(request)).response, content_type="application/json")


async def delete_response(request: web.Request) -> web.Response:
    await _found(request)
    response_id = request.match_info["id"]
    await request.app[RESPONSES].forget(response_id, user_of(request).name)
    return json_response(Deleted(response_id))


async def _found(request: web.Request) -> Stored:
    store, response_id = request.app.get(RESPONSES), request.match_info["id"]
    if store is None:
        raise ApiError(404, NOT_KEPT, code="not_found")
    found = await store.find(response_id, user_of(request).name)
    if found is None:
        raise ApiError(404, f"there is no response {response_id[:100]!r}", code="not_found")
    return found
