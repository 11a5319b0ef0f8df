"""The loop of the engine's process: reads messages, steps while there is work, writes outputs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from scheduler import garbage
from scheduler.attention import BackendError
from scheduler.config import EngineConfig
from scheduler.models.memory import KVCacheTooSmallError
from scheduler.models.model_config import UnsupportedModelError
from scheduler.observing.logs import configure
from scheduler.observing.trace import Recording, TraceFile
from scheduler.process.engine_core import EngineCore
from scheduler.wire.messages import (
    OUTPUTS,
    REQUESTS,
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineInfo,
    FromEngine,
    Launch,
    LearnTokenizer,
    Recorded,
    RecordTrace,
    SequenceOutput,
    Shutdown,
    Snapshot,
    StepOutputs,
    ToEngine,
    Watch,
)
from scheduler.wire.pulse import Pulse

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 1000

SHORTEST_LIMIT, COMPILING_LIMIT = 30.0, 900.0
"""Seconds that any step may take, and any of a GPU."""

PATIENCE = 100.0
"""Times what a step should take, that it may take."""

TEST_HOOK = "CAROUSEL_TEST_HOOK"
"""The environment variable that names a module of the tests, which makes the engine fail."""

INTAKE_SECONDS = 0.01
"""Between two steps, messages are taken in for about so long: a burst of long prompts does not hold up the
streams."""

MAP_SECONDS = 1.0
"""The block pool's picture is made no more often than this: unlike the seats it takes a look at every block."""


def run(launch: Launch, folder: Path, pulse: Pulse) -> None:
    """Load the model and serve, until told to shut down."""
    config = EngineConfig.model_construct(**launch.config)
    configure(launch.log_level, config.log_format)
    context = zmq.Context()
    requests = context.socket(zmq.PULL)
    requests.bind(f"ipc://{folder}/{REQUESTS}")
    outputs = context.socket(zmq.PUSH)
    outputs.connect(f"ipc://{folder}/{OUTPUTS}")
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromEngine) -> None:
        outputs.send(encoder.encode(message))

    try:
        core = EngineCore(config, launch.model_path)
        trace = TraceFile(Path(config.trace)) if config.trace is not None else None
    except (UnsupportedModelError, BackendError, KVCacheTooSmallError, OSError) as error:
        send(EngineFailed(f"cannot serve {launch.model_path}: {error}"))
    except Exception as error:
        logger.exception("the engine could not start")
        send(EngineFailed(f"the engine could not start: {type(error).__name__}: {error}"))
    else:
        if (hook := os.environ.get(TEST_HOOK)) is not None:
            importlib.import_module(hook).install(core)
        core.before_step = lambda requests, seconds: pulse.begin(requests, _limit(config, core.info, seconds))
        send(core.info)
        with contextlib.closing(trace) if trace is not None else contextlib.nullcontext():
            if trace is not None:
                core.observers.append(trace)
            garbage.keep_what_is_there()
            EngineLoop(core, send, pulse).run(requests)
    finally:
        context.destroy(linger=1000)


def _limit(config: EngineConfig, info: EngineInfo, seconds: float) -> float:
    """After how many seconds a step hangs that should take so many. A GPU's first steps compile."""
    if config.step_timeout is not None:
        return config.step_timeout
    return max(SHORTEST_LIMIT if info.device == "cpu" else COMPILING_LIMIT, PATIENCE * seconds)


class EngineLoop:
    """Alternates between intake and step, and answers those who look on."""

    def __init__(self, core: EngineCore, send: Callable[[FromEngine], None], pulse: Pulse) -> None:
        self._core = core
        self._send = send
        self._pulse = pulse
        self._intake: list[SequenceOutput] = []
        self._publishing = 0.0
        self._watch_interval: float | None = None
        self._next_look = 0.0
        self._next_map = 0.0
        self._recordings: dict[int, Recording] = {}

    def run(self, requests: zmq.Socket[bytes]) -> None:
        """Until told to shut down."""
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while True:
            # Busy: take what has arrived and go on. Idle: wait.
            timeout = 0 if self._core.has_work else IDLE_POLL_MS
            received = False
            until = math.inf
            while time.monotonic() < until and requests.poll(timeout):
                if not received:
                    until = time.monotonic() + INTAKE_SECONDS
                timeout = 0
                received = True
                message = decoder.decode(requests.recv())
                if isinstance(message, Shutdown):
                    return
                self._take(message)
            garbage.collect(is_idle=not self._core.has_work)
            if self._core.has_work:
                self._step()
            elif received:
                snapshot = self._look(time.monotonic())
                self._send(StepOutputs(self._intake, self._core.state, snapshot=snapshot))
                self._intake = []

    def _take(self, message: ToEngine) -> None:
        match message:
            case AddRequest(request, progress):
                self._pulse.begin([request.request_id], SHORTEST_LIMIT)
                self._intake += self._core.add(request, progress)
                self._pulse.end()
            case AbortRequest(request_id, index, reason):
                self._intake += self._core.abort(request_id, index, reason)
            case LearnTokenizer(definition):
                self._core.learn_tokenizer(definition)
            case Watch(interval):
                self._watch_interval = interval
            case RecordTrace(number, 0):
                if (recording := self._recordings.pop(number, None)) is not None:
                    self._core.observers.remove(recording)
            case RecordTrace(number, num_steps):
                self._recordings[number] = Recording(num_steps)
                self._core.observers.append(self._recordings[number])

    def _look(self, now: float) -> Snapshot | None:
        """A snapshot, if somebody watches and it is time for one. Before the engine idles it always is: no later
        one would show that all have left."""
        if self._watch_interval is None or (now < self._next_look and self._core.has_work):
            return None
        self._next_look = now + self._watch_interval
        with_blocks = now >= self._next_map or not self._core.has_work
        if with_blocks:
            self._next_map = now + MAP_SECONDS
        return self._core.snapshot(with_blocks=with_blocks)

    def _step(self) -> None:
        self._pulse.begin(list(self._core.scheduler.live_requests), SHORTEST_LIMIT)  # until there is a plan
        result = self._core.step()
        self._pulse.end()
        started = time.monotonic()
        snapshot = self._look(started)
        outputs = self._intake + result.outputs
        self._send(StepOutputs(outputs, result.state, result.step, self._publishing, snapshot))
        self._intake = []
        self._publishing = time.monotonic() - started
        for number, recording in list(self._recordings.items()):
            if recording.is_done:
                self._send(Recorded(number, recording.encode()))
                self._core.observers.remove(self._recordings.pop(number))
