"""POST /v1/messages and POST /v1/messages/count_tokens, for clients that speak Anthropic's API."""

from __future__ import annotations

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from scheduler.core.request import InvalidRequestError
from scheduler.fitting import TOO_LONG, PromptTooLongError
from server.api.conversation import understand
from server.api.counting import counted
from server.api.generation import Asked, answer
from server.api.messages_api.request import CountRequest, MessagesRequest
from server.api.messages_api.wording import MessagesWording
from server.api.models import longest_sequence
from server.api.reading import read
from server.api.shape import check_fields
from server.app_keys import ENGINE
from server.http.record import RequestRecord


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


def in_their_words(handler: Handler) -> Handler:
    """Programs read the two numbers in this sentence, and make the conversation shorter."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except PromptTooLongError as error:
            raise InvalidRequestError(
                f"prompt is too long: {error.num_tokens} tokens > {error.longest - 1} maximum",
                "messages",
                TOO_LONG,
            ) from error

    return handle


@in_their_words
async def create_message(request: web.Request) -> web.StreamResponse:
    return await answer(request, _understand, prompt_field="messages")


def _understand(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    _check(app, content, MessagesRequest)
    conversation = understand(app, read(app, record, content, MessagesRequest).ask())
    block_size = app[ENGINE].info.block_size if CACHES in content else None
    return conversation.asked(MessagesWording(conversation, block_size))


CACHES = b'"cache_control"'
"""A key of requests that ask for what is cached here anyway: then it is told how much that is."""


def _check(app: web.Application, content: bytes, model: type[CountRequest]) -> None:
    check_fields(content, model, longest_sequence(app[ENGINE].info))


@in_their_words
async def count_tokens(request: web.Request) -> web.StreamResponse:
    return await counted(request, _count)


def _count(app: web.Application, record: RequestRecord, content: bytes) -> TokenCount:
    _check(app, content, CountRequest)
    body = read(app, record, content, CountRequest)
    return TokenCount(len(understand(app, body.ask()).prompt))
