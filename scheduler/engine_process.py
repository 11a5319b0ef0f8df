"""The engine's own process: reads messages, steps while there is work, writes outputs.

Started by AsyncEngine as `python -m scheduler.engine_process`, with its settings as one JSON line on stdin.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

import msgspec
import zmq

from scheduler.attention import BackendError
from scheduler.config import EngineConfig
from scheduler.engine import EngineCore
from scheduler.kv_cache import KVCacheTooSmallError
from scheduler.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    FromEngine,
    Launch,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from scheduler.model import UnsupportedModelError

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 1000


def main() -> None:
    # Ctrl-C reaches the whole process group; the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    logging.basicConfig(level=launch.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    context = zmq.Context()
    requests = context.socket(zmq.PULL)
    requests.connect(launch.requests_address)
    outputs = context.socket(zmq.PUSH)
    outputs.connect(launch.outputs_address)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromEngine) -> None:
        outputs.send(encoder.encode(message))

    try:
        core = EngineCore(EngineConfig.model_construct(**launch.config), launch.model_path)
    except (UnsupportedModelError, BackendError, KVCacheTooSmallError, OSError) as error:
        send(EngineFailed(f"cannot serve {launch.model_path}: {error}"))
    except Exception as error:
        logger.exception("the engine could not start")
        send(EngineFailed(f"the engine could not start: {type(error).__name__}: {error}"))
    else:
        send(core.info)
        serve(core, requests, send)
    finally:
        context.destroy(linger=1000)


def serve(core: EngineCore, requests: zmq.Socket[bytes], send: Callable[[FromEngine], None]) -> None:
    """Alternate between intake and step until told to shut down, or until the parent is gone."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    parent = os.getppid()
    while os.getppid() == parent:
        # Busy: take what has arrived and go on. Idle: wait.
        intake: list[SequenceOutput] = []
        received = False
        timeout = 0 if core.has_work else IDLE_POLL_MS
        while requests.poll(timeout):
            timeout = 0
            received = True
            message = decoder.decode(requests.recv())
            match message:
                case AddRequest(request):
                    intake += core.add(request)
                case AbortRequest(request_id, index):
                    intake += core.abort(request_id, index)
                case Shutdown():
                    return
        if core.has_work:
            result = core.step()
            send(StepOutputs(intake + result.outputs, result.state, result.step))
        elif received:
            send(StepOutputs(intake, core.state))


if __name__ == "__main__":
    main()
