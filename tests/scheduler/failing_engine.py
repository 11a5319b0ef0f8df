"""Imported by the engine's process under test (CAROUSEL_TEST_HOOK): makes it fail where a request says so.

The request's first token says how, once it is in a step.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from scheduler.engine.core import EngineCore
from scheduler.execution.runner import Runner
from scheduler.step import StepInput

KILLS, SPINS, RAISES, EXITS_AT_LENGTH, OBSERVER = 101, 102, 103, 104, 105
LENGTH = 20


def install(core: EngineCore) -> None:
    launch = Runner.launch

    def failing(runner: Runner, step: StepInput) -> Any:
        for chunk in step.chunks:
            first = chunk.token_ids[0] if chunk.start == 0 else None
            if first == KILLS:
                os.kill(os.getpid(), signal.SIGSEGV)
            if first == SPINS:
                while True:  # the pulse's thread goes on
                    time.sleep(0.001)
            if first == RAISES:
                raise ZeroDivisionError("a step that fails")
            if first == EXITS_AT_LENGTH and len(chunk.token_ids) < LENGTH:
                core_exit.append(chunk.request_id)
            if chunk.request_id in core_exit and chunk.start == LENGTH:
                os._exit(3)
        return launch(runner, step)

    core_exit: list[str] = []
    Runner.launch = failing  # type: ignore[assignment,method-assign]
