"""Imported by the engine's process under test (CAROUSEL_TEST_HOOK): makes it fail where a request says so.

The first token of a request's prompt says how, when it is computed.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from scheduler.engine.core import EngineCore
from scheduler.execution.runner import Runner
from scheduler.planning.blocks import Prefix
from scheduler.planning.seating import Seating
from scheduler.planning.sequence import Sequence
from scheduler.step import StepInput

KILLS, SPINS_ONCE, RAISES, FAILS_PLANNING, FAILS_COMMIT = 101, 102, 103, 104, 105

SPUN = "CAROUSEL_TEST_SPUN"
"""The environment variable that names a file: it is made before an engine spins, and no other spins then."""


def install(core: EngineCore) -> None:
    _fail_steps()
    _fail_accounts()


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
            if first == SPINS_ONCE and not Path(os.environ[SPUN]).exists():
                Path(os.environ[SPUN]).touch()
                while True:  # the pulse's thread goes on
                    time.sleep(0.001)
            if first == RAISES:
                raise ZeroDivisionError("a step that fails")
        return launch(runner, step)

    Runner.launch = failing  # type: ignore[assignment,method-assign]
