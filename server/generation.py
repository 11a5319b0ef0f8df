"""From a validated request to its answer: the part that is the same for both endpoints."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol, TypeVar

import msgspec
from aiohttp import web

from scheduler.async_engine import Delta
from scheduler.request import FinishReason, SamplingParams
from scheduler.stream import Ownership
from server.access_log import Trace, trace_of
from server.app_keys import ADMISSION, CONFIG, ENGINE, LEDGER, user_of
from server.errors import NO_RETRY, ApiError, as_api_error
from server.metering import Meter
from server.openai_requests import GenerationRequest
from server.openai_responses import PromptTokensDetails, Usage, json_response
from server.sse import EventStream

LONG_TEXT = 8192
"""Characters from which text is tokenized in a thread, so that other streams do not wait (about 2 ms)."""

TIMEOUT_HEADER = "X-Request-Timeout"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

T = TypeVar("T")


class Shape(Protocol):
    """How an endpoint words its answer. `choice` counts the sequences of all prompts."""

    id: str

    def chunk(self, choice: int, delta: Delta) -> msgspec.Struct:
        """One event of a stream."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The last event of a stream, if the client asked for it."""

    def whole(self, choices: Sequence[Delta], usage: Usage) -> msgspec.Struct:
        """The answer in one piece."""


def check_model(request: web.Request, model: str | None) -> None:
    """A request may name the served model or none."""
    served = request.app[CONFIG].model_name
    if model not in (None, served):
        raise ApiError(
            404,
            f"the model {model!r} is not served here; {served!r} is",
            param="model",
            code="model_not_found",
        )


async def tokenize(num_characters: int, encode: Callable[[], T]) -> T:
    """Call `encode`, whose time grows with the text, without holding up the other streams."""
    return encode() if num_characters < LONG_TEXT else await asyncio.to_thread(encode)


async def answer(
    request: web.Request,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    shape: Shape,
) -> web.StreamResponse:
    """Generate for the prompts and send the answer, as a stream or in one piece."""
    trace = trace_of(request)
    trace.response_id = shape.id
    if request.app[CONFIG].log_prompts:
        trace.prompts = [request.app[ENGINE].tokenizer.decode(prompt) for prompt in prompts]
    # Closing the generator aborts what still runs: when the client is gone, when a write fails, on any error.
    async with aclosing(_generate(request, body, prompts, params, trace)) as deltas:
        if body.stream:
            return await _stream(request, deltas, shape, body.include_usage)
        choices: list[list[Delta]] = [[] for _ in range(len(prompts) * params.n)]
        async for choice, delta in deltas:
            choices[choice].append(delta)
        return json_response(shape.whole([_joined(parts) for parts in choices], _usage(trace)))


async def _stream(
    request: web.Request, deltas: AsyncGenerator[tuple[int, Delta], None], shape: Shape, include_usage: bool
) -> web.StreamResponse:
    first = await anext(deltas)  # up to here an error still has a status of its own
    events = await EventStream.open(request)
    try:
        await events.send(shape.chunk(*first))
        async for choice, delta in deltas:
            if delta.text or delta.logprobs or delta.finish_reason:
                await events.send(shape.chunk(choice, delta))
        if include_usage:
            await events.send(shape.usage_chunk(_usage(trace_of(request))))
        await events.done()
    except ConnectionError:
        raise
    except Exception as error:
        await events.send(as_api_error(error, request).body)
    return await events.close()


async def _generate(
    request: web.Request,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    trace: Trace,
) -> AsyncGenerator[tuple[int, Delta], None]:
    """What each step adds to each choice, counted as it comes. A failed sequence fails the whole request."""
    user = user_of(request)
    ownership = Ownership(
        user=user.name,
        weight=user.weight,
        max_running=user.limits.max_running,
        priority=user.engine_priority + body.priority,
        deadline=_deadline(request, body, trace),
        cache_salt=body.cache_salt,
    )
    meter = Meter(user.name, prompts, trace, request[ADMISSION], request.app[LEDGER])
    engine = request.app[ENGINE]
    streams = [
        engine.generate(prompt, params, request_id=f"{trace.response_id}-{place}", **ownership)
        for place, prompt in enumerate(prompts)
    ]
    async with aclosing(_interleaved(streams)) as deltas:
        async for place, delta in deltas:
            meter.count(place, delta)
            match delta.finish_reason:
                case FinishReason.ERROR:
                    raise ApiError(
                        500, delta.error or "the engine failed", type="server_error", code="engine_error"
                    )
                case FinishReason.ABORT:
                    raise ApiError(503, "the request was aborted", type="server_error", code="aborted")
                case FinishReason.TIMEOUT:
                    raise ApiError(
                        408,
                        f"the request's deadline passed after {trace.completion_tokens} tokens of the answer",
                        type="timeout",
                        code="timeout",
                        headers=NO_RETRY,
                    )
            yield place * params.n + delta.index, delta


def _deadline(request: web.Request, body: GenerationRequest, trace: Trace) -> float | None:
    """When the answer has to be there, on the monotonic clock: the sooner of what body and header say."""
    seconds = [] if body.timeout is None else [body.timeout]
    if (header := request.headers.get(TIMEOUT_HEADER)) is not None:
        if not (_SECONDS.fullmatch(header) and float(header) > 0):
            raise ApiError(400, f"{TIMEOUT_HEADER} should be a number of seconds above 0, got {header[:40]!r}")
        seconds.append(float(header))
    return trace.started + min(seconds) if seconds else None


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

    pumps = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case item:
                    yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _joined(parts: Sequence[Delta]) -> Delta:
    """All that one sequence produced, as if one step had."""
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=[logprob for part in parts for logprob in part.logprobs or ()] or None,
    )


def _usage(trace: Trace) -> Usage:
    return Usage(
        prompt_tokens=trace.prompt_tokens,
        completion_tokens=trace.completion_tokens,
        total_tokens=trace.prompt_tokens + trace.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=trace.cached_tokens),
    )
