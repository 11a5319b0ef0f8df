"""Plan, execute, commit, and again: the loop that everything else is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scheduler.core.plan import Gain
from scheduler.core.request import FinishReason, Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.sequence import Sequence
from scheduler.core.step import Executor


class Engine:
    """One running batch. Everything happens in `step()`, in one thread."""

    def __init__(self, scheduler: Scheduler, executor: Executor[Any]) -> None:
        self.scheduler = scheduler
        self._executor = executor

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request, and return its sequences, which grow as steps are run. Raises `InvalidRequestError` if
        it can never fit."""
        return self.scheduler.add(request)

    def step(self) -> list[Gain]:
        """Run one step, and return what each sequence in it gained. One whose logits are not numbers is ended."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return []
        results = self._executor.collect(self._executor.launch(plan.step_input()))
        done = list(zip(plan.chunks, results, strict=True))
        for chunk, result in done:
            if result.is_broken:
                self.scheduler.finish(chunk.sequence, FinishReason.ERROR)
        plan.chunks = [chunk for chunk, result in done if not result.is_broken]
        return self.scheduler.commit(plan, [result for _, result in done if not result.is_broken])

    def run(self) -> Iterator[Gain]:
        """Run steps until nothing is left to do."""
        while self.scheduler.has_work:
            yield from self.step()
