"""From a validated request to its answer: the part that is the same for both endpoints."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from scheduler.client.async_engine import AsyncEngine, Delta
from scheduler.client.beam_search import BeamOptions, search_beams
from scheduler.client.stream import Ownership
from scheduler.core.request import FinishReason, InvalidRequestError
from scheduler.sampling_params import SamplingParams
from server.api.completion_objects import Usage
from server.api.metering import Meter
from server.api.models import longest_sequence
from server.api.requests import ServedRequest, StreamOptions
from server.api.structured import Form
from server.api.wording import Wording, usage_of
from server.app_keys import ADMISSION, BACKGROUND_LIMITS, CONFIG, ENGINE, LEDGER, LIMITS, user_of
from server.http.body import body_of
from server.http.errors import NO_RETRY, ApiError, as_api_error
from server.http.json import Answer
from server.http.record import RequestRecord, record_of
from server.http.sse import EventStream
from server.http.worker import work
from server.users.directory import User

PATIENCE_SECONDS = 1.0
"""How long a stream's first token is waited for before the headers go out: an error until then has a status."""

MAX_LOGPROBS = 2_000_000
"""Of an answer in one piece: some 100 MB."""

AT_ONCE = 16
"""Prompts of one request that are submitted in one turn of the event loop (about 2 ms)."""

TIMEOUT_HEADER = "X-Request-Timeout"
logger = logging.getLogger(__name__)

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is right by itself."""

    body: ServedRequest
    prompts: Sequence[list[int]]
    params: SamplingParams
    wording: Wording
    form: Form | None
    """What the answer is held to."""
    beams: BeamOptions | None = None
    """How the best answers are searched, if they are not sampled."""
    prediction: list[int] = field(default_factory=list)
    """Tokens that the client expects in the answer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something has to be found before it can be said what a request asks."""

    find: Callable[[], Awaitable[Any]]
    """For the event loop."""
    go_on: Callable[[Any], Asked]
    """With what was found. May be called in a thread."""


Understand = Callable[[web.Application, RequestRecord, bytes], Asked | Wanted]
"""Makes of a body what it asks, or raises what is wrong with it. May be called in a thread."""


def truncated(body: ServedRequest, token_ids: list[int], longest: int) -> list[int]:
    """A prompt as long as the request wants it, where `longest` tokens would fit."""
    count = body.truncate_prompt_tokens
    if count is None:
        return token_ids
    count = max(1, longest if count == -1 else count)
    if len(token_ids) <= count:
        return token_ids
    return token_ids[-count:] if body.truncation_side == "left" else token_ids[:count]


@contextmanager
def _naming_prompt(field: str) -> Iterator[None]:
    """What is wrong with the prompt is told of the `field` that it came in."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param == "prompt":
            error.param = field
        raise


async def answer(request: web.Request, understand: Understand, *, prompt_field: str) -> web.StreamResponse:
    """Read the body, have it understood, generate, and send the answer, as a stream or in one piece. What is wrong
    with the prompt is told of the `prompt_field`."""
    with _naming_prompt(prompt_field):
        return await _answer(request, understand)


async def _answer(request: web.Request, understand: Understand) -> web.StreamResponse:
    app, user = request.app, user_of(request)
    app[LIMITS].check_rates(user)
    async with AsyncExitStack() as while_read:
        body = await while_read.enter_async_context(body_of(request))
        with app[LIMITS].admit(user) as request[ADMISSION]:  # it has a place in the queue only when it is there
            asked = await _understood(app, user, body, understand, record_of(request))
            del body
            await while_read.aclose()
            return await _answer_asked(request, asked)


async def _answer_asked(request: web.Request, asked: Asked) -> web.StreamResponse:
    app, user, record = request.app, user_of(request), record_of(request)
    if app[CONFIG].log_prompts:
        decode = app[ENGINE].tokenizer.decode
        num_tokens = sum(map(len, asked.prompts))
        record.prompts = await work(app, user.name, num_tokens, lambda: list(map(decode, asked.prompts)))
    # Closing the generator aborts what still runs: when the client is gone, when a write fails, on any error.
    meter = Meter(user.name, asked.prompts, record, request[ADMISSION], app[LEDGER])
    ownership = _ownership(user, asked, _deadline(request, asked.body, record))
    async with aclosing(_generate(app[ENGINE], asked, ownership, meter, record)) as deltas:
        if (streaming := asked.body.streaming) is not None:
            return await _stream(request, deltas, asked, streaming)
        async for choice, delta in deltas:
            asked.wording.take(choice, delta)
        return await EventStream.whole(request, asked.wording.whole(usage_of(record)))


def _check_size(asked: Asked, longest: int) -> None:
    """An answer in one piece is kept until its end."""
    params = asked.params
    if asked.body.streaming is not None:
        return
    most = 0
    for prompt in asked.prompts:
        if params.logprobs is not None:
            num_tokens = min(params.max_tokens or longest, longest - len(prompt))
            most += num_tokens * params.n * (1 + params.logprobs)
        if params.prompt_logprobs is not None:
            most += len(prompt) * params.n * (1 + params.prompt_logprobs)
    if most > MAX_LOGPROBS:
        raise InvalidRequestError(
            f"the answer may have {most} logprobs, and in one piece it can have {MAX_LOGPROBS}: lower max_tokens, "
            "n or the number of logprobs, or stream it",
            "logprobs",
        )


async def _stream(
    request: web.Request,
    deltas: AsyncGenerator[tuple[int, Delta], None],
    asked: Asked,
    options: StreamOptions,
) -> web.StreamResponse:
    record, wording = record_of(request), asked.wording

    async def send(said: Sequence[msgspec.Struct]) -> None:
        for event in said:
            await events.send(event)

    async def send_delta(choice: int, delta: Delta) -> None:
        usage: Usage | UnsetType | None = None if options.include_usage else UNSET
        await send(wording.chunk(choice, delta, usage_of(record) if options.continuous_usage_stats else usage))

    first = asyncio.ensure_future(anext(deltas))
    try:
        await asyncio.wait([first], timeout=PATIENCE_SECONDS)
        if first.done():
            first.result()  # up to here an error still has a status of its own
        events = await wording.stream.open(request)
        try:
            async with events.kept_alive():
                await send(wording.opening())
                await send_delta(*await first)
                async for choice, delta in deltas:
                    await send_delta(choice, delta)
            await send(wording.closing(usage_of(record)))
            await events.end()
        except ConnectionError:
            raise
        except Exception as error:
            await send([wording.failure(as_api_error(error, request))])
        return await events.close()
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


def _ownership(user: User, asked: Asked, deadline: float | None) -> Ownership:
    return Ownership(
        user=user.name,
        weight=user.weight,
        max_running=user.limits.max_running,
        priority=user.engine_priority + asked.body.priority,
        deadline=deadline,
        cache_salt=asked.body.cache_salt,
        prediction=asked.prediction,
    )


async def answer_in_background(
    app: web.Application,
    user: User,
    account: str,
    content: bytes,
    understand: Understand,
    record: RequestRecord,
    *,
    prompt_field: str,
) -> Answer:
    """The answer in one piece to a body that no connection waits for. The user's limits hold and the ledger has
    it in their name; it waits in a queue apart, and in the engine it is of the class `low`, on an `account` of its
    own. Raises what `answer` raises."""
    app[BACKGROUND_LIMITS].check_rates(user)
    with _naming_prompt(prompt_field), app[BACKGROUND_LIMITS].admit(user) as admission:
        asked = await _understood(app, user, content, understand, record)
        meter = Meter(user.name, asked.prompts, record, admission, app[LEDGER])
        owner = user.model_copy(update={"name": account, "priority": "low"})
        deadline = None if asked.body.timeout is None else record.started + asked.body.timeout
        ownership = _ownership(owner, asked, deadline)
        async with aclosing(_generate(app[ENGINE], asked, ownership, meter, record)) as deltas:
            async for choice, delta in deltas:
                asked.wording.take(choice, delta)
        return asked.wording.whole(usage_of(record))


async def _understood(
    app: web.Application, user: User, content: bytes, understand: Understand, record: RequestRecord
) -> Asked:
    asked = await work(app, user.name, len(content), partial(understand, app, record, content))
    if isinstance(asked, Wanted):
        asked = await work(app, user.name, len(content), partial(asked.go_on, await asked.find()))
    if asked.form is not None:
        asked = await _held(app, user, asked, asked.form)
    _check_size(asked, longest_sequence(app[ENGINE].info))
    record.response_id = asked.wording.id
    return asked


async def _held(app: web.Application, user: User, asked: Asked, form: Form) -> Asked:
    """The same, if its grammar can be served. Raises `InvalidRequestError` if that is needed and cannot be."""
    try:
        await app[ENGINE].grammars.check(user.name, form.grammar, form.field)
    except InvalidRequestError as error:
        if form.is_needed:
            raise
        logger.info("an answer is not held to the form of its calls: %s", error)
        params = msgspec.structs.replace(asked.params, grammar=None)
        return replace(asked, form=None, params=params)
    return asked


async def _generate(
    engine: AsyncEngine, asked: Asked, ownership: Ownership, meter: Meter, record: RequestRecord
) -> AsyncGenerator[tuple[int, Delta], None]:
    """What each step adds to each choice, counted as it comes. A failed sequence fails the whole request."""
    params = asked.params
    generate = engine.generate if asked.beams is None else partial(search_beams, engine, options=asked.beams)
    streams = [
        generate(
            prompt,
            params,
            request_id=f"{record.response_id}-{place}",
            computed=partial(meter.computed, place),
            **ownership,
        )
        for place, prompt in enumerate(asked.prompts)
    ]
    async with aclosing(_interleaved(streams)) as deltas:
        async for place, delta in deltas:
            meter.count(place, delta)
            match delta.finish_reason:
                case FinishReason.REFUSED:
                    raise InvalidRequestError(delta.output.error or "the request cannot be served")
                case FinishReason.ERROR:
                    message = delta.output.error or "the engine failed"
                    raise ApiError(500, message, type="server_error", code="engine_error")
                case FinishReason.ABORT:
                    raise ApiError(503, "the request was aborted", type="server_error", code="aborted")
                case FinishReason.TIMEOUT:
                    raise ApiError(
                        408,
                        f"the request's deadline passed after {record.completion_tokens} tokens of the answer",
                        type="timeout",
                        code="timeout",
                        headers=NO_RETRY,
                    )
            if not delta.is_empty:
                yield place * params.n + delta.index, delta


def _deadline(request: web.Request, body: ServedRequest, record: RequestRecord) -> float | None:
    """When the answer has to be there, on the monotonic clock: the sooner of what body and header say."""
    seconds = [] if body.timeout is None else [body.timeout]
    if (header := request.headers.get(TIMEOUT_HEADER)) is not None:
        if not (_SECONDS.fullmatch(header) and float(header) > 0):
            raise ApiError(400, f"{TIMEOUT_HEADER} should be a number of seconds above 0, got {header[:40]!r}")
        seconds.append(float(header))
    return record.started + min(seconds) if seconds else None


async def _interleaved(
    streams: Sequence[AsyncGenerator[Delta, None]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The items of all streams as they come, each with its stream's place. The first error ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return

    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

    async def pump(place: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    arrived.put_nowait((place, delta))
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    pumps: list[asyncio.Task[None]] = []
    running = len(streams)
    try:
        for place, stream in enumerate(streams):
            pumps.append(asyncio.create_task(pump(place, stream)))
            if place % AT_ONCE == 0:
                await asyncio.sleep(0)
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case item:
                    yield item
    finally:
        await asyncio.shield(asyncio.create_task(_end(pumps)))  # all of them, even if somebody is in a hurry


async def _end(pumps: Sequence[asyncio.Task[None]]) -> None:
    for place, task in enumerate(pumps):
        task.cancel()
        if place % AT_ONCE == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*pumps, return_exceptions=True)
