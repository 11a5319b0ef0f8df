"""POST /v1/responses, and those that were kept."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web

from scheduler.core.request import InvalidRequestError
from server.api.conversation import understand
from server.api.generation import Asked, Wanted, answer
from server.api.models import longest_sequence
from server.api.reading import read
from server.api.responses_api.answers import Response
from server.api.responses_api.items import input_items
from server.api.responses_api.recent import LIFETIME_SECONDS, RECENT, response_of
from server.api.responses_api.request import Json, ResponsesRequest
from server.api.responses_api.store import RESPONSES, Stored
from server.api.responses_api.truncation import understand_what_fits
from server.api.responses_api.wording import ResponsesWording
from server.api.shape import check_fields
from server.app_keys import ENGINE, user_of
from server.http.errors import ApiError
from server.http.json import encode, json_response
from server.http.record import RequestRecord
from server.validation import count_of

NOT_KEPT = "responses are not kept here: the server has to be started with --store FILE"


class Deleted(msgspec.Struct, frozen=True):
    id: str
    object: str = "response"
    deleted: bool = True


class InputItems(msgspec.Struct, frozen=True):
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


MAX_PAGE = 100


async def create_response(request: web.Request) -> web.StreamResponse:
    return await answer(request, partial(understand_response, user_of(request).name), prompt_field="input")


def understand_response(user: str, app: web.Application, record: RequestRecord, content: bytes) -> Asked | Wanted:
    """Raises whatever is wrong with the request. May be called in a thread."""
    check_fields(content, ResponsesRequest, longest_sequence(app[ENGINE].info))
    body = read(app, record, content, ResponsesRequest)
    store = app.get(RESPONSES)
    if store is None and body.store:
        raise InvalidRequestError(NOT_KEPT, "store")
    if store is None and body.previous_response_id is not None:
        raise InvalidRequestError(NOT_KEPT, "previous_response_id")
    asked = partial(_asked, user, app, body)
    if body.previous_response_id is None and not body.referenced:
        return asked(body.items({}))
    return Wanted(partial(_items, app, user, body), asked)


def _asked(user: str, app: web.Application, body: ResponsesRequest, items: list[Json]) -> Asked:
    """`items`: what was said up to the answer."""
    store = app.get(RESPONSES)
    ask = body.ask(items)
    conversation = understand_what_fits(app, ask) if body.truncation == "auto" else understand(app, ask)
    is_stored = store is not None and body.store is not False

    def keep(response: Response) -> None:
        if body.store is False:
            return
        content = encode(response)
        said = msgspec.json.decode(content)["output"]  # logprobs are JSON already
        if store is not None:
            store.keep(response.id, user, content, [*items, *said])
        else:
            app[RECENT].keep(user, response.id, said)

    wording = ResponsesWording(app[ENGINE].tokenizer, body, conversation, is_stored=is_stored, on_end=keep)
    return conversation.asked(wording)


async def _items(app: web.Application, user: str, body: ResponsesRequest) -> list[Json]:
    """All that was said before the answer. Raises `ApiError` for what cannot be found."""
    before: list[Json] = []
    if (previous := body.previous_response_id) is not None:
        kept = await app[RESPONSES].find(previous, user)
        if kept is None:
            raise ApiError(
                404,
                f"there is no response {previous[:100]!r}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        before = kept.items
    found: dict[str, Json] = {}
    for item_id in body.referenced:
        if item_id not in found:
            found |= await _items_around(app, user, item_id)
        if item_id not in found:
            raise ApiError(
                404,
                f"there is no item {item_id[:100]!r}: those of an answer are kept for {LIFETIME_SECONDS // 60} "
                "minutes, or with --store FILE as long as it is, and not with store: false",
                param="input",
                code="item_not_found",
            )
    return [*before, *body.items(found)]


async def _items_around(app: web.Application, user: str, item_id: str) -> dict[str, Json]:
    """The items of the answer that one of this id is part of, by their ids, if it is known."""
    response_id = response_of(item_id)
    if response_id is None:
        return {}
    if (store := app.get(RESPONSES)) is None:
        items = app[RECENT].find(user, response_id) or []
    else:
        kept = await store.find(response_id, user)
        items = [] if kept is None else kept.items
    return {item["id"]: item for item in items if "id" in item}


async def get_response(request: web.Request) -> web.Response:
    return web.Response(body=(await _found(request)).response, content_type="application/json")


async def list_input_items(request: web.Request) -> web.Response:
    """What was said before a response that was kept, the newest first if not `order=asc`."""
    found, response_id = await _found(request), request.match_info["id"]
    num_said = len(msgspec.json.decode(found.response)["output"])
    items = input_items(response_id, found.items[: len(found.items) - num_said])
    if (limit := count_of(request.query.get("limit", "20"), MAX_PAGE)) is None:
        raise InvalidRequestError(f"limit should be a number from 1 to {MAX_PAGE}", "limit")
    if request.query.get("order", "desc") != "asc":
        items = items[::-1]
    if (after := request.query.get("after")) is not None:
        place = next((place for place, item in enumerate(items, 1) if item["id"] == after), None)
        if place is None:
            raise InvalidRequestError(f"after is none of the items: {after[:100]!r}", "after")
        items = items[place:]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return json_response(InputItems(page, first, last, len(page) < len(items)))


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
