"""AsyncEngine: the asyncio face of an engine that runs in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Self, Unpack

import msgspec
import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry

from scheduler.config import EngineConfig
from scheduler.engine.background import run_or_tell
from scheduler.engine.stream import Delta, Ownership, RequestStream, make_request
from scheduler.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineState,
    FromEngine,
    Launch,
    LearnTokenizer,
    Recorded,
    RecordTrace,
    SeatView,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    StepStats,
    ToEngine,
    Watch,
)
from scheduler.models.model_source import ModelNotFoundError, resolve_model, with_draft_model
from scheduler.observing.metrics import EngineMetrics
from scheduler.request import DeadlineError, FinishReason, Request
from scheduler.sampling_params import InvalidRequestError, SamplingParams
from scheduler.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

__all__ = ["AsyncEngine", "Delta", "EngineDeadError", "EngineStartError"]

SHUTDOWN_SECONDS = 5.0


class EngineStartError(RuntimeError):
    """The engine could not start; the message is for the user."""


class EngineDeadError(RuntimeError):
    """The engine's process is gone; the message says why."""


class _Client:
    """One request in flight: its stream of text, and the queue that its deltas go through."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.stream = RequestStream(request, tokenizer)
        self.queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.first_token_at: float | None = None
        self.last_token_at: dict[int, float] = {}


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
        self.error: str | None = None
        """None while the engine is well, else why it is not."""
        self.metrics = EngineMetrics(registry or CollectorRegistry(), config.model)
        self.listeners: list[Callable[[StepStats], None]] = []
        """Called with what each step did, before its tokens reach the streams."""
        self.latency_listeners: list[Callable[[float, bool], None]] = []
        """Called with each token's latency in seconds, and whether it is the request's first: then it counts from
        the request's arrival, else from the token before."""
        self.state = EngineState(0, 0, 0, 0, 0.0)
        """As of the last step."""
        self.seats: list[SeatView] = []
        self.block_map = b""
        """The batch and the blocks as last seen, while `watch` is on."""
        self._recordings: dict[int, asyncio.Future[bytes]] = {}
        self._clients: dict[str, _Client] = {}
        self._teaching: asyncio.Task[InvalidRequestError | None] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._num_requests = 0
        self._num_recordings = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[EngineInfo]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    # Life -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Fetch the model if need be, start the engine's process, and return when it is ready to serve.

        Raises `EngineStartError`.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._socket_folder = tempfile.TemporaryDirectory(prefix="carousel-")
        self._context = zmq.asyncio.Context()
        self._requests = self._context.socket(zmq.PUSH)
        # Sending never waits: the end that connects queues what it sends even while nobody is there to take it, as
        # when the process has just died, and the end that binds would wait for the next to come.
        self._requests.set(zmq.SNDHWM, 0)
        self._requests.connect(f"ipc://{self._socket_folder.name}/requests")
        self._outputs = self._context.socket(zmq.PULL)
        self._outputs.bind(f"ipc://{self._socket_folder.name}/outputs")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scheduler.engine.process", stdin=asyncio.subprocess.PIPE
        )
        try:  # while the process imports what it needs, which takes longer
            model_path = await asyncio.to_thread(resolve_model, self.config.model)
            config = await asyncio.to_thread(with_draft_model, self.config)
        except BaseException as error:
            process, self._process = self._process, None
            process.kill()  # it has not been told anything yet
            await process.wait()
            self._release()
            if isinstance(error, ModelNotFoundError):
                raise EngineStartError(str(error)) from error
            raise
        launch = Launch(
            config=config.model_dump(mode="json", include=set(EngineConfig.model_fields)),
            model_path=model_path,
            requests_address=f"ipc://{self._socket_folder.name}/requests",
            outputs_address=f"ipc://{self._socket_folder.name}/outputs",
            log_level=logging.getLogger().getEffectiveLevel(),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._tasks = [
            asyncio.create_task(run_or_tell("receiving from the engine's process", self._receive, self._fail_all)),
            asyncio.create_task(self._watch(self._process)),
        ]
        try:
            # The tokenizer loads while the engine does.
            self.tokenizer = await asyncio.to_thread(self._load_tokenizer, model_path)
            self.info = await self._ready
            self._teaching = asyncio.create_task(self._teach_tokenizer())
        except BaseException as error:
            await self.stop()
            if isinstance(error, OSError):  # transformers' word for: no tokenizer there
                raise EngineStartError(f"cannot load a tokenizer from {model_path}: {error}") from error
            raise

    async def stop(self) -> None:
        """End the engine's process; requests still in flight fail with `EngineDeadError`."""
        process, self._process = self._process, None
        if process is None:
            return
        self._fail_all("the engine was stopped")
        if process.returncode is None:
            await self._send(Shutdown())
            try:
                await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        tasks = [*self._tasks, *([self._teaching] if self._teaching is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._release()

    def _release(self) -> None:
        self._context.destroy(linger=0)
        self._socket_folder.cleanup()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if self._process is not None:
            self._fail_all(f"the engine's process ended unexpectedly (exit code {code}); its log says why")
            logger.error("%s", self.error)

    def _fail_all(self, reason: str) -> None:
        self.error = self.error or reason
        self.metrics.record_engine_end()
        if not self._ready.done():
            self._ready.set_exception(EngineStartError(reason))
        for recorded in self._recordings.values():
            if not recorded.done():
                recorded.set_exception(EngineDeadError(self.error))
        for client in self._clients.values():
            client.queue.put_nowait(EngineDeadError(self.error))

    # Requests -------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        **ownership: Unpack[Ownership],
    ) -> AsyncGenerator[Delta, None]:
        """Yield what each step adds, until all `params.n` sequences have ended.

        Nothing is submitted before the first item is asked for; closing or cancelling the generator aborts the
        request. Raises `InvalidRequestError` or `DeadlineError` before the first item, and `EngineDeadError` at
        any time.
        """
        if self.error is not None:
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
        client = _Client(request, self.tokenizer)
        self.metrics.record_request(request.user)
        self._clients[request.request_id] = client
        try:
            if params.grammar is not None:
                await self._can_read_text()
            await self._send(AddRequest(request))
            while not client.stream.finished or not client.queue.empty():
                item = await client.queue.get()
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason is FinishReason.TIMEOUT and item.error is not None:
                    raise DeadlineError(item.error)
                yield item
        finally:
            del self._clients[request.request_id]
            self.metrics.record_departure(request.user, was_running=bool(client.last_token_at))
            if not client.stream.finished and self.error is None:
                await self._send(AbortRequest(request.request_id))

    async def _teach_tokenizer(self) -> InvalidRequestError | None:
        """The engine has to know what its tokens say, for answers that are held to a grammar. It learns it before
        there is anything to do: that takes longer than a step. Returns why it cannot."""
        try:
            definition = await asyncio.to_thread(self.tokenizer.definition)
        except InvalidRequestError as error:
            return error
        await self._send(LearnTokenizer(definition))
        return None

    async def _can_read_text(self) -> None:
        """Raises `InvalidRequestError` where the engine never will."""
        assert self._teaching is not None
        obstacle = await asyncio.shield(self._teaching)
        if obstacle is not None:
            raise obstacle

    async def watch(self, interval: float | None) -> None:
        """Keep `seats` and `block_map` up to date, every `interval` seconds at most; None: no more."""
        await self._send(Watch(interval))

    async def record_trace(self, num_steps: int) -> bytes:
        """The next steps as a JSON array of Chrome trace events; returns when they are done. Raises
        `EngineDeadError`."""
        if self.error is not None:
            raise EngineDeadError(self.error)
        self._num_recordings += 1
        recorded: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        number = self._num_recordings
        self._recordings[number] = recorded
        try:
            await self._send(RecordTrace(number, num_steps))
            return await recorded
        finally:
            del self._recordings[number]
            if self.error is None and (recorded.cancelled() or not recorded.done()):  # whoever asked has gone
                await self._send(RecordTrace(number, 0))

    @property
    def waiting(self) -> dict[str, int]:
        """How many requests wait for their first token, by user."""
        return dict(
            Counter(client.stream.request.user for client in self._clients.values() if not client.last_token_at)
        )

    async def _send(self, message: ToEngine) -> None:
        await self._requests.send(self._encoder.encode(message))

    async def _receive(self) -> None:
        """Hand the engine's messages to those who wait for them."""
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            message = decoder.decode(await self._outputs.recv())
            match message:
                case EngineInfo():
                    self.metrics.record_engine(message)
                    if not self._ready.done():  # else it is being stopped already
                        self._ready.set_result(message)
                case EngineFailed():
                    if not self._ready.done():
                        self._ready.set_exception(EngineStartError(message.message))
                case Recorded():
                    recorded = self._recordings.get(message.number)
                    if recorded is not None and not recorded.done():  # else whoever asked has gone
                        recorded.set_result(message.events)
                case StepOutputs():
                    try:
                        self._take_note(message)
                    except Exception:
                        logger.exception("taking note of a step failed")
                    await self._publish(message.outputs)

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
            except Exception as error:
                logger.exception("publishing an output of request %s failed", output.request_id)
                if client is not None:
                    client.queue.put_nowait(error)

    async def _push(self, client: _Client, output: SequenceOutput, now: float) -> None:
        delta = client.stream.push(output)
        if delta is None:
            return
        if delta.token_ids:
            self._record_token(client, output, now)
        client.queue.put_nowait(delta)
        if client.stream.finished:
            self._record_end(client, now)
        if delta.finish_reason is not None and output.finish_reason is None:  # met a stop string
            await self._send(AbortRequest(output.request_id, output.index, FinishReason.STOP))

    def _record_token(self, client: _Client, output: SequenceOutput, now: float) -> None:
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

    def _record_end(self, client: _Client, now: float) -> None:
        if client.first_token_at is not None:
            arrival = client.stream.request.arrival_time
            self.metrics.record_finished_request(now - arrival, now - client.first_token_at)
