"""AsyncEngine: the asyncio face of an engine that runs in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Self, Unpack

from prometheus_client import CollectorRegistry

from scheduler.client.grammars import Grammars
from scheduler.client.in_flight import Computed, InFlight
from scheduler.client.lesson import Lesson
from scheduler.client.recordings import Recordings
from scheduler.client.stream import Delta, Ownership, make_request
from scheduler.client.supervisor import EngineDeadError, EngineStartError, Phase, Supervisor
from scheduler.client.suspects import Suspects
from scheduler.config import EngineConfig
from scheduler.core.request import FinishReason
from scheduler.features.deadline import DeadlineError
from scheduler.models.files.model_source import ModelNotFoundError, resolve_model
from scheduler.observing.metrics import EngineMetrics
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import (
    AbortRequest,
    AddRequest,
    EngineInfo,
    EngineState,
    FromEngine,
    Launch,
    Recorded,
    SeatView,
    SequenceOutput,
    StepOutputs,
    StepStats,
    Watch,
)

logger = logging.getLogger(__name__)

__all__ = ["AsyncEngine", "Delta", "EngineDeadError", "EngineStartError", "Phase", "RequestCrashedError"]

LATE_SECONDS = 0.25
"""After a deadline, in which the engine may tell of it itself."""

NO_STATE = EngineState(0, 0, 0, 0, 0.0)


class RequestCrashedError(RuntimeError):
    """The request makes the engine crash; the message says so."""


class AsyncEngine:
    """Starts an engine process, submits requests to it, and hands out their tokens as they come.

    ```python
    async with AsyncEngine(EngineConfig()) as engine:
        async for delta in engine.generate(engine.tokenizer.encode("Hello"), SamplingParams()):
            print(delta.text, end="")
    ```
    """

    info: EngineInfo
    tokenizer: Tokenizer
    grammars: Grammars

    def __init__(
        self,
        config: EngineConfig,
        registry: CollectorRegistry | None = None,
        *,
        chat_template: str | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        self.config = config
        self._load_tokenizer = partial(
            Tokenizer, chat_template=chat_template, special_tokens_in_text=special_tokens_in_text
        )
        self.metrics = EngineMetrics(registry or CollectorRegistry(), config.model)
        self.listeners: list[Callable[[StepStats], None]] = []
        """Called with what each step did, before its tokens reach the streams."""
        self.latency_listeners: list[Callable[[float, bool], None]] = []
        """Called with each token's latency in seconds, and whether it is the request's first: then it counts from
        the request's arrival, else from the token before."""
        self.failed = asyncio.Event()
        """Set when there is no engine any more, and will be none."""
        self.state = NO_STATE
        """As of the last step."""
        self.seats: list[SeatView] = []
        self.block_map = b""
        """The batch and the blocks as last seen, while `watch` is on."""
        self._supervisor = Supervisor(self)
        self._suspects = Suspects()
        self._engine_number = 0
        """Counts the engines that there have been."""
        self._recordings = Recordings(self._supervisor)
        self._clients: dict[str, InFlight] = {}
        self._leaving: dict[str, Computed] = {}
        """By request, of those that are over here, and that the engine has yet to end: a step may be under way."""
        self._loading: asyncio.Task[Tokenizer] | None = None
        self._lesson: Lesson | None = None
        self._watch_interval: float | None = None
        self._num_requests = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    # Life -----------------------------------------------------------------------------------------------

    @property
    def error(self) -> str | None:
        """None while the engine is well, else why it is not."""
        return self._supervisor.obstacle

    @property
    def phase(self) -> Phase:
        """Whether it is starting, for the first time or again, ready, or gone."""
        return self._supervisor.phase

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one."""
        return self._supervisor.pid

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._clients)

    async def start(self) -> None:
        """Fetch the model if need be, start the engine's process, and return when it is ready to serve.

        Raises `EngineStartError`.
        """
        try:
            await self._supervisor.start(self._find)
            assert self._loading is not None
            self.tokenizer = await self._loading
        except BaseException as error:
            await self.stop()
            if isinstance(error, ModelNotFoundError):
                raise EngineStartError(str(error)) from error
            if isinstance(error, OSError):  # transformers' word for: no tokenizer there
                raise EngineStartError(f"cannot load a tokenizer for {self.config.model}: {error}") from error
            raise
        self._lesson = Lesson(self.tokenizer, self._supervisor)
        self.grammars = Grammars(self.tokenizer.definition, self.info.eos_token_ids)

    async def _find(self) -> Launch:
        """What is to be launched. The tokenizer loads while the engine does."""
        model_path = await asyncio.to_thread(resolve_model, self.config.model)
        self._loading = asyncio.create_task(asyncio.to_thread(self._load_tokenizer, model_path))
        return Launch(
            config=self.config.model_dump(mode="json", include=set(EngineConfig.model_fields)),
            model_path=model_path,
            log_level=logging.getLogger().getEffectiveLevel(),
        )

    async def stop(self) -> None:
        """End the engine's process; requests still in flight fail with `EngineDeadError`."""
        await self._supervisor.stop()
        self._give_up(self.error or "")
        if self._lesson is not None:
            await self._lesson.end()
            await asyncio.to_thread(self.grammars.close)
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    # What the supervisor tells --------------------------------------------------------------------------

    async def engine_ready(self, info: EngineInfo) -> None:
        """A new engine: it is told all that the last one knew, and the requests in flight go on."""
        self._engine_number += 1
        self.info = info
        self.metrics.record_engine(info)
        if self._lesson is not None:
            await self._lesson.repeat()
        if self._watch_interval is not None:
            await self._supervisor.send(Watch(self._watch_interval))
        await self._submit_all()

    async def engine_says(self, message: FromEngine) -> None:
        match message:
            case Recorded():
                self._recordings.take(message)
            case StepOutputs():
                try:
                    self._take_note(message)
                except Exception:
                    logger.exception("taking note of a step failed")
                await self._publish(message.outputs)

    def engine_lost(self, reason: str, in_hand: Sequence[str]) -> None:
        """The next engine goes on with all requests, but for one that is at fault."""
        self.metrics.record_engine_lost()
        self.state, self.seats, self.block_map = NO_STATE, [], b""
        self._leaving.clear()
        self._recordings.give_up(reason)
        culprit = self._suspects.crashed(in_hand)
        if culprit is None:
            return
        self._suspects.cleared(culprit)
        logger.error("request %s makes the engine crash: it was alone in it now", culprit)
        if (client := self._clients.get(culprit)) is not None:
            client.queue.put_nowait(
                RequestCrashedError("this request makes the engine crash, again and again, in the end alone")
            )

    def engine_failed(self, reason: str) -> None:
        self._give_up(reason)
        self.failed.set()

    def _give_up(self, reason: str) -> None:
        self.metrics.record_engine_end()
        self._recordings.give_up(reason)
        for client in self._clients.values():
            client.queue.put_nowait(EngineDeadError(reason))

    # Requests -------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        computed: Computed = lambda num_tokens: None,
        **ownership: Unpack[Ownership],
    ) -> AsyncGenerator[Delta, None]:
        """Yield what each step adds, until all `params.n` sequences have ended. `computed` is told, as the prompt
        is computed, how many tokens of it have been; and once more after an abort, when the engine knows.

        Nothing is submitted before the first item is asked for; closing or cancelling the generator aborts the
        request. Raises `InvalidRequestError` or `DeadlineError` before the first item, and `EngineDeadError` at
        any time.
        """
        if self.phase in (Phase.FAILED, Phase.STOPPED):
            raise EngineDeadError(self.error)
        self._num_requests += 1
        request = make_request(
            f"{request_id or 'request'}#{self._num_requests}",  # unique whatever the client sent
            prompt_token_ids,
            params,
            self.info,
            self.tokenizer,
            **ownership,
        )
        if params.grammar is not None:
            assert self._lesson is not None
            await self.grammars.check(request.user, params.grammar)
            await self._lesson.learned()
        client = InFlight(request, self.tokenizer, computed)
        self.metrics.record_request(request.user)
        self._clients[request.request_id] = client
        try:
            await self._submit(client)
            while not client.stream.finished or not client.queue.empty():
                item = await client.queue.get()
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason is FinishReason.TIMEOUT and item.output.error is not None:
                    raise DeadlineError(item.output.error)
                yield item
        finally:
            del self._clients[request.request_id]
            if client.timer is not None:
                client.timer.cancel()
            self.metrics.record_departure(request.user, was_running=bool(client.last_token_at))
            is_known = self.phase is Phase.READY and client.engine_number == self._engine_number
            if is_known and (client.has_expired or not client.stream.finished):
                self._leaving[request.request_id] = computed
            if not client.stream.finished:
                await self._supervisor.send(AbortRequest(request.request_id))
            await self._clear(request.request_id)

    async def _submit(self, client: InFlight) -> None:
        """Hand a request to the engine, if there is one that has not got it yet. While a suspect runs alone the
        others wait."""
        request = client.stream.request
        if request.deadline is not None and client.timer is None:
            seconds = max(0.0, request.deadline - time.monotonic()) + LATE_SECONDS
            client.timer = asyncio.get_running_loop().call_later(seconds, self._expire, client)
        if self.phase is not Phase.READY or self._suspects.alone not in (None, request.request_id):
            return
        if client.engine_number == self._engine_number or client.stream.finished:
            return
        client.engine_number = self._engine_number
        progress = client.stream.progress
        is_new = len(progress) == request.params.n and all(each.num_computed == 0 for each in progress)
        await self._supervisor.send(AddRequest(request, None if is_new else progress))

    async def _submit_all(self) -> None:
        """Hand all requests to an engine that is new to them, or to a suspect first."""
        self._suspects.next(self._clients)
        for client in list(self._clients.values()):
            await self._submit(client)

    async def _clear(self, request_id: str) -> None:
        """A request got what it asks for, or has ended: it is not what makes the engine crash."""
        if self._suspects.cleared(request_id):
            await self._submit_all()

    def _expire(self, client: InFlight) -> None:
        """A request's deadline has come, whatever the engine is doing: a step may be long, or hang."""
        request = client.stream.request
        client.has_expired = not client.stream.finished
        for progress in client.stream.progress:
            output = SequenceOutput(
                request.request_id,
                progress.index,
                finish_reason=FinishReason.TIMEOUT,
                num_cached_tokens=progress.num_cached_tokens,
                num_computed=progress.num_computed,
            )
            self.metrics.record_finished_sequence(FinishReason.TIMEOUT)
            delta = client.stream.push(output)
            if delta is not None:
                client.queue.put_nowait(delta)

    async def watch(self, interval: float | None) -> None:
        """Keep `seats` and `block_map` up to date, every `interval` seconds at most; None: no more."""
        self._watch_interval = interval
        await self._supervisor.send(Watch(interval))

    async def record_trace(self, num_steps: int) -> bytes:
        """The next steps as a JSON array of Chrome trace events; returns when they are done. Raises
        `EngineDeadError`."""
        if self.error is not None:
            raise EngineDeadError(self.error)
        return await self._recordings.record(num_steps)

    @property
    def waiting(self) -> dict[str, int]:
        """How many requests wait for their first token, by user."""
        return dict(
            Counter(client.stream.request.user for client in self._clients.values() if not client.last_token_at)
        )

    def _take_note(self, message: StepOutputs) -> None:
        self.metrics.record_state(message.state)
        self.state = message.state
        if message.snapshot is not None:
            self.seats = message.snapshot.seats
            self.block_map = message.snapshot.blocks or self.block_map
        if message.step is not None:
            self.metrics.record_step(message.step, message.publishing)
            for listener in self.listeners:
                listener(message.step)

    async def _publish(self, outputs: list[SequenceOutput]) -> None:
        """Hand each output to its stream. One that cannot be handed out ends its own request and no other."""
        now = time.monotonic()
        for output in outputs:
            client = self._clients.get(output.request_id)
            try:
                if output.finish_reason is not None:
                    self.metrics.record_finished_sequence(output.finish_reason)
                if client is not None:
                    await self._push(client, output, now)
                elif output.finish_reason is not None and (computed := self._leaving.pop(output.request_id, None)):
                    computed(output.num_computed)
            except Exception as error:
                logger.exception("publishing an output of request %s failed", output.request_id)
                if client is not None:
                    client.queue.put_nowait(error)

    async def _push(self, client: InFlight, output: SequenceOutput, now: float) -> None:
        if output.num_computed > client.num_computed:
            client.num_computed = output.num_computed
            client.computed(output.num_computed)
            if output.request_id == self._suspects.alone:  # it has passed the step in which the engine was lost
                await self._clear(output.request_id)
        client.has_expired &= output.finish_reason is None
        delta = client.stream.push(output)
        if delta is None or delta.is_empty:
            return
        if delta.token_ids or output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):  # or an embedding
            self._supervisor.has_progressed()
            await self._clear(output.request_id)
        if delta.token_ids:
            self._record_token(client, output, now)
        client.queue.put_nowait(delta)
        if client.stream.finished:
            self._record_end(client, now)
        if delta.finish_reason is not None and output.finish_reason is None:  # met a stop string
            await self._supervisor.send(AbortRequest(output.request_id, output.index, FinishReason.STOP))

    def _record_token(self, client: InFlight, output: SequenceOutput, now: float) -> None:
        request = client.stream.request
        self.metrics.record_tokens(request.user, len(output.token_ids))
        last = client.last_token_at.get(output.index)
        if last is not None:
            self.metrics.record_next_token(now - last)
            self._tell_latency(now - last, is_first=False)
        elif not client.last_token_at:
            client.first_token_at = now
            self.metrics.record_first_token(request.user, now - request.arrival_time, output.queue_time)
            self._tell_latency(now - request.arrival_time, is_first=True)
        client.last_token_at[output.index] = now

    def _tell_latency(self, seconds: float, *, is_first: bool) -> None:
        for listener in self.latency_listeners:
            listener(seconds, is_first)

    def _record_end(self, client: InFlight, now: float) -> None:
        if client.first_token_at is not None:
            arrival = client.stream.request.arrival_time
            self.metrics.record_finished_request(now - arrival, now - client.first_token_at)
