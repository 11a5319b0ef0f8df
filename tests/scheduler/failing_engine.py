"""Imported by the engine's process under test (CAROUSEL_TEST_HOOK): makes it fail where a request says so.

The first token of a request's prompt says how, when it is computed.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec

from scheduler.core.blocks import Prefix
from scheduler.core.seating import Seating
from scheduler.core.sequence import Sequence
from scheduler.core.step import StepInput
from scheduler.execution.runner import Runner
from scheduler.process.engine_core import EngineCore

KILLS, SPINS_ONCE, RAISES, FAILS_PLANNING, FAILS_COMMIT, GARBLES_ONCE = 101, 102, 103, 104, 105, 106

FAILED_ONCE = "CAROUSEL_TEST_FAILED_ONCE"
"""The environment variable that names a file: it is made before what an engine does only once, and no other does
it then."""


def install(core: EngineCore) -> None:
    _fail_steps()
    _fail_accounts()
    _garble()


def _is_first() -> bool:
    mark = Path(os.environ[FAILED_ONCE])
    if mark.exists():
        return False
    mark.touch()
    return True


def _garble() -> None:
    """What the engine says is no message."""
    step = EngineCore.step

    def garbling(core: EngineCore) -> Any:
        said = step(core)
        is_asked = any(each.token_ids[0] == GARBLES_ONCE for each in core.scheduler.running.values())
        return msgspec.structs.replace(said, state="none") if is_asked and _is_first() else said

    EngineCore.step = garbling  # type: ignore[assignment,method-assign]


def _fail_accounts() -> None:
    """What the scheduler does for a request fails, and what it leaves cannot be trusted."""
    admit, settle = Seating.admit, Seating.settle

    def failing_admit(seating: Seating, sequence: Sequence, prefix: Prefix) -> None:
        if sequence.token_ids[0] == FAILS_PLANNING:
            raise ZeroDivisionError("planning that fails")
        admit(seating, sequence, prefix)

    def failing_settle(seating: Seating, sequence: Sequence) -> None:
        if sequence.token_ids[0] == FAILS_COMMIT:
            raise ZeroDivisionError("committing that fails")
        settle(seating, sequence)

    Seating.admit = failing_admit  # type: ignore[assignment,method-assign]
    Seating.settle = failing_settle  # type: ignore[assignment,method-assign]


def _fail_steps() -> None:
    launch = Runner.launch

    def failing(runner: Runner, step: StepInput) -> Any:
        for first in [chunk.token_ids[0] for chunk in step.chunks if chunk.start == 0]:
            if first == KILLS:
                os.kill(os.getpid(), signal.SIGSEGV)
            if first == SPINS_ONCE and _is_first():
                while True:  # the pulse's thread goes on
                    time.sleep(0.001)
            if first == RAISES:
                raise ZeroDivisionError("a step that fails")
        return launch(runner, step)

    Runner.launch = failing  # type: ignore[assignment,method-assign]
