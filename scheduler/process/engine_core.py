"""EngineCore: intake, plan, execute, commit, publish. docs/architecture.md draws this loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from scheduler.config import EngineConfig
from scheduler.core.blocks import BlockPool
from scheduler.core.plan import Chunk, Plan
from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.sequence import Sequence
from scheduler.core.step import StepInput, StepResult
from scheduler.features.audit import picture, set_up_anew, violations
from scheduler.features.deadline import DeadlineError, Deadlines, least_seconds
from scheduler.features.giving_way import GivingWay
from scheduler.features.leftovers import Leftovers
from scheduler.features.long_positions import LongPositions
from scheduler.features.prices import Prices, choosing_cost
from scheduler.features.resuming import resumed
from scheduler.features.saved_states import SavedStates
from scheduler.features.step_cost import StepCost
from scheduler.kernels.native import kernels
from scheduler.models.loading import load, usable_cpus
from scheduler.process.compiling import Compiling
from scheduler.process.failed_step import is_device_lost, is_out_of_memory, run_in_parts
from scheduler.process.free_cores import FreeCores
from scheduler.process.mask_turns import MaskTurns
from scheduler.process.outputs import is_news, output_of, part_of, refused, view_of
from scheduler.process.parts import drafter_of, make_policy, pacing_of, runner_of, window_of
from scheduler.process.stopwatch import Stopwatch
from scheduler.text.grammar import Grammar
from scheduler.wire.messages import (
    Draft,
    EngineState,
    Phases,
    Progress,
    Received,
    SequenceOutput,
    Snapshot,
    StepOutputs,
    StepStats,
)

logger = logging.getLogger(__name__)


MAP_CELLS = 1024
"""Cells of a snapshot's picture of the block pool, at most."""


CHECK_EVERY, CHECK_IDLE = 1024, 16
"""Steps between two checks of the accounts, and at least before one when the engine is about to idle: it looks at
every block."""


COMPILING_SECONDS = 0.02
"""How long an idle engine waits for a grammar before it looks for messages again."""

FAILED = "the engine failed on this request; its log says why"

NO_TOKEN = "no token can be chosen: the model's logits are not numbers, or the request forbids all of them"


class StepObserver(Protocol):
    """Looks at steps; see trace.py."""

    def step(self, plan: Plan, started: float, stats: StepStats, ended: Iterable[Sequence]) -> None:
        """A step that began at `started` (monotonic clock) is over, and these sequences ended in it."""


class EngineCore:
    """One model, one block pool, one running batch. Everything happens in `step()`, in one thread."""

    def __init__(self, config: EngineConfig, model_path: str) -> None:
        """Load the model and allocate the pool. Raises what `loading.load` raises."""
        loaded = load(config, model_path)
        can = loaded.can
        self.cost = StepCost()
        windows = [group.window for group in loaded.cache.groups]
        self.pool = BlockPool(can.num_blocks, can.block_size, windows)
        self._prices = Prices(output=config.output_token_price, cached=config.cached_token_price)
        longest_ms = config.longest_step_ms if config.target_itl_ms is None else config.target_itl_ms
        self._policy = make_policy(config.policy, self._prices, Leftovers(self.cost, longest_ms / 1000))
        states = SavedStates(can.num_state_slots, can.block_size) if can.num_state_slots else None
        self.scheduler = Scheduler(
            self.pool,
            self._policy,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.step_tokens(loaded.device.type),
            max_model_len=can.max_model_len,
            eos_token_ids=can.eos_token_ids,
            prefix_caching=config.prefix_caching and (not can.keeps_state or states is not None),
            share_prefixes=config.share_prefixes,
            pacing=pacing_of(config, self.cost, self._policy),
            drafter=drafter_of(config, loaded, self.cost),
            window=window_of(can),
            states=states,
            yielding=GivingWay(self._policy),
        )
        self.info = msgspec.structs.replace(loaded.info, num_seats=self.scheduler.num_seats)
        self.model = loaded.model
        self.executor = runner_of(loaded, self.scheduler.num_seats)
        self.steerings = self.executor.steerings
        self._compiling = Compiling(can.eos_token_ids)
        self._mask_turns = MaskTurns()
        self._deadlines = Deadlines()
        self.positions = LongPositions(self.scheduler, can.long_after)
        self._resuming: dict[str, list[Progress]] = {}
        """By request, of those whose grammars are being compiled."""
        self.before_step: Callable[[list[str], float], None] = lambda requests, seconds: None
        """Told before a step is executed which requests are in it, and how long it should take."""
        self.observers: list[StepObserver] = []
        """Told of every step, once it is over."""
        if config.threads is None and loaded.cache.backend.name == "native":
            self.observers.append(FreeCores(usable_cpus(), kernels().limit_threads))
        self._num_unchecked = 0
        """Steps since the last check of the accounts."""
        self._last_end: float | None = None
        """When the last step ended, if it left work to do."""

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or len(self._compiling) > 0

    @property
    def state(self) -> EngineState:
        return EngineState(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_used_blocks=self.pool.num_used,
            num_cached_blocks=len(self.pool.cached_blocks),
            fairness_gap=self._policy.gap,
            num_prompt_tokens_left=sum(
                max(0, each.num_prompt_tokens - each.num_computed_tokens)
                for each in self.scheduler.running.values()
            ),
        )

    def learn_tokenizer(self, definition: str) -> None:
        """As `Tokenizer.definition` has it: needed before the first request that has a grammar."""
        self._compiling.learn(definition)

    def add(self, request: Request, progress: list[Progress] | None = None) -> list[SequenceOutput]:
        """Queue a request, or the rest of one that was lost with another engine. If it can never be served, or not
        in time, the outputs say so; otherwise there are none yet. One that has a grammar is queued when that is
        compiled."""
        if request.params.grammar is None:
            return self._queue(request, progress)
        if (grammar := self._compiling.known(request)) is not None:
            return self._queue_held(request, grammar, progress)
        if progress is not None:
            self._resuming[request.request_id] = progress
        try:
            self._compiling.begin(request)
        except InvalidRequestError as error:
            return refused(request, FinishReason.ERROR, str(error))
        return []

    def _take_compiled(self) -> list[SequenceOutput]:
        """Queue the requests whose grammars are ready; with nothing else to do, wait for one."""
        outputs = []
        for request, grammar, error in self._compiling.take(0.0 if self.scheduler.has_work else COMPILING_SECONDS):
            if grammar is None:
                outputs += refused(request, FinishReason.ERROR, error or "")
            else:
                outputs += self._queue_held(request, grammar, self._resuming.pop(request.request_id, None))
        return outputs

    def _queue_held(
        self, request: Request, grammar: Grammar, progress: list[Progress] | None
    ) -> list[SequenceOutput]:
        """Queue a request whose grammar is compiled. Of one that is refused nothing is kept."""
        outputs = self._queue(request, progress)
        if not outputs:
            self.steerings.hold(request.request_id, grammar)
        return outputs

    def _queue(self, request: Request, progress: list[Progress] | None) -> list[SequenceOutput]:
        try:
            if request.deadline is not None and progress is None:
                self._check_deadline(request, request.deadline - time.monotonic())
            lost = None if progress is None else [resumed(request, each) for each in progress]
            sequences = self.scheduler.add(request, lost)
            self._deadlines.add(sequences)
            self.positions.begin(sequences)
        except (InvalidRequestError, DeadlineError) as error:
            reason = FinishReason.TIMEOUT if isinstance(error, DeadlineError) else FinishReason.ERROR
            return refused(request, reason, str(error))
        except Exception:
            if request.request_id in self.scheduler.live_requests:
                raise  # half of it is there: nothing here can be trusted any more
            logger.exception("request %s could not be queued", request.request_id)
            return refused(request, FinishReason.ERROR, FAILED)
        return []

    def _check_deadline(self, request: Request, seconds_left: float) -> None:
        """Raise `DeadlineError` for a request that would be late even if nobody else were served meanwhile."""
        scheduler = self.scheduler
        needed = least_seconds(
            request,
            num_cached=self.positions.num_cached_tokens(request),
            block_size=self.pool.block_size,
            most_tokens=scheduler.max_batched_tokens,
            most_gained=scheduler.drafter.most_tokens,
            cost=self.cost,
        )
        if needed > seconds_left:
            raise DeadlineError(
                f"the answer would take {needed:.1f} s at least, even if nobody else were served, and the "
                f"request's timeout ends in {max(0.0, seconds_left):.1f} s"
            )

    def abort(
        self, request_id: str, index: int | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> list[SequenceOutput]:
        """End a request, or one of its sequences, at once; unknown ids are ignored."""
        self._resuming.pop(request_id, None)
        compiling = self._compiling.drop(request_id)
        if compiling is not None:
            return refused(compiling, reason, None)
        ended = self.scheduler.abort(request_id, index, reason)
        self._forget(ended)
        return [output_of(sequence) for sequence in ended]

    def _forget(self, ended: Iterable[Sequence]) -> None:
        """What is kept for requests of which no sequence is left."""
        for sequence in ended:
            self._mask_turns.forget(sequence)
            self._deadlines.forget(sequence)
            request_id = sequence.request.request_id
            if request_id not in self.scheduler.live_requests:
                self.steerings.forget(request_id)

    def step(self) -> StepOutputs:
        """Run one step: every running sequence moves on, and those that end leave."""
        late = self._take_compiled()
        clock = Stopwatch()
        expired = self._deadlines.expire(self.scheduler, time.monotonic())
        plan = self.scheduler.schedule()
        self._mask_turns.rest(plan)
        now = time.monotonic()
        for sequence in plan.admitted:
            sequence.seated_time = now
        planning = clock.lap()
        in_hand = [chunk.sequence.request.request_id for chunk in plan.chunks]
        self.before_step(in_hand, self.cost.predict(plan.num_tokens, plan.attended))
        results, failed, sampling_time = self._execute(plan)
        executing = clock.lap() - sampling_time
        gains = self.scheduler.commit(plan, results)
        self.positions.settle(chunk.sequence for chunk in plan.chunks)
        ended = expired + [gain.sequence for gain in gains if gain.sequence.finish_reason is not None]
        now = time.monotonic()
        for gain in gains:
            if gain.result.tokens and gain.sequence.first_token_time is None:
                gain.sequence.first_token_time = now
        outputs = late + [output_of(sequence) for sequence in expired] + failed
        seconds = executing + sampling_time
        outputs += [
            output_of(gain.sequence, gain, part=part_of(gain.chunk, len(plan.chunks), seconds))
            for gain in gains
            if is_news(gain)
        ]
        num_violations = self._check()
        phases = Phases(planning, executing, sampling_time, clock.lap())
        self._learn(plan, clock)
        self._mask_turns.learn(plan, self.steerings.seconds, clock.total)
        step = StepStats(
            duration=clock.total,
            num_tokens=plan.num_tokens,
            num_prompt_tokens=sum(work.prompt for work in plan.work),
            num_cached_tokens=sum(sequence.num_cached_tokens for sequence in plan.admitted),
            num_recomputed_tokens=sum(work.recomputed for work in plan.work),
            num_sampled_tokens=sum(len(gain.result.tokens) for gain in gains),
            num_preemptions=len(plan.preempted),
            num_yielded=plan.num_yielded,
            num_lookup_tokens=sum(sequence.num_prompt_tokens for sequence in plan.admitted),
            phases=phases,
            num_violations=num_violations,
            users=self._received(plan, clock.total),
            drafts=[
                Draft(chunk.draft_kind, len(chunk.drafted), len(chunk.drafted) - work.refused)
                for chunk, work in zip(plan.chunks, plan.work, strict=True)
                if chunk.drafted
            ],
        )
        self._forget(ended)
        self._tell_observers(plan, clock.started, step, ended)
        return StepOutputs(outputs, self.state, step)

    def _check(self) -> int:
        """Before the engine idles, and now and then: do the accounts of seats and blocks add up? Returns how many
        things did not, and were repaired."""
        self._num_unchecked += 1
        if self._num_unchecked < (CHECK_EVERY if self.has_work else min(CHECK_EVERY, CHECK_IDLE)):
            return 0
        self._num_unchecked = 0
        found = violations(self.scheduler.seating)
        if found:
            set_up_anew(self.scheduler)
        for violation in found:
            logger.error("the block pool was set up anew, please report it: %s", violation)
        return len(found)

    def _tell_observers(self, plan: Plan, started: float, step: StepStats, ended: list[Sequence]) -> None:
        """One that fails is told no more: nobody's answer depends on who looks on."""
        for observer in list(self.observers):
            try:
                observer.step(plan, started, step, ended)
            except Exception:
                logger.exception("%s failed; it is told of no more steps", type(observer).__name__)
                self.observers.remove(observer)

    def snapshot(self, *, with_blocks: bool) -> Snapshot:
        """Who sits where, and perhaps the state of the blocks."""
        seats = list(map(view_of, self.scheduler.running.values()))
        return Snapshot(seats, picture(self.pool, MAP_CELLS) if with_blocks else None)

    def _learn(self, plan: Plan, clock: Stopwatch) -> None:
        """What streams feel is the time from one step's end to the next: what comes between counts too."""
        if plan.chunks:
            since = clock.started if self._last_end is None else self._last_end
            self.cost.observe(plan.num_tokens, plan.attended, clock.now - since)
        self._last_end = clock.now if self.has_work else None

    def _received(self, plan: Plan, duration: float) -> dict[str, Received]:
        """What the step did for each user: its time is theirs by tokens, those that are costly to choose counted
        as what they cost."""
        service: dict[str, float] = {}
        tokens: dict[str, float] = {}
        for chunk, work in zip(plan.chunks, plan.work, strict=True):
            user = chunk.sequence.request.user
            service[user] = service.get(user, 0.0) + self._prices.service(work)
            tokens[user] = tokens.get(user, 0) + chunk.num_computed + choosing_cost(chunk)
        per_token = duration / max(1, sum(tokens.values()))
        return {user: Received(service[user], per_token * count) for user, count in tokens.items()}

    def _execute(self, plan: Plan) -> tuple[StepResult, list[SequenceOutput], float]:
        """Execute the plan. A sequence that makes it fail is taken out of the plan and ended; the others go on.
        The last result is the time that sampling took."""
        if not plan.chunks:  # all that was to run ran out of time
            return [], [], 0.0
        step = plan.step_input()
        sampling = Stopwatch()
        failed: list[SequenceOutput] = []
        try:
            handle = self.executor.launch(step)
            sampling = Stopwatch()
            results = self.executor.collect(handle)
        except Exception as error:
            if is_device_lost(error):
                raise  # the next engine goes on with what this one has
            logger.exception("a step of %d sequences failed; running them one at a time", len(plan.chunks))
            results, failed = self._execute_singly(plan, step)
            if is_out_of_memory(error):
                self._take_smaller_steps(plan.num_tokens)
        done = list(zip(plan.chunks, results, strict=True))
        failed += [self._fail_without_token(chunk) for chunk, result in done if result.is_broken]
        plan.chunks = [chunk for chunk, result in done if not result.is_broken]
        results = [result for result in results if not result.is_broken]
        return results, failed, sampling.lap()

    def _execute_singly(self, plan: Plan, step: StepInput) -> tuple[StepResult, list[SequenceOutput]]:
        """One request must not take the others with it: find out which one does."""
        failed: list[SequenceOutput] = []
        chunks, plan.chunks = plan.chunks, []
        results: StepResult = []
        for chunk, alone in zip(chunks, run_in_parts(self.executor, step), strict=True):
            if isinstance(alone, Exception):
                logger.error("request %s failed", chunk.sequence.request.request_id, exc_info=alone)
                failed.append(self._fail(chunk, FAILED))
                continue
            plan.chunks.append(chunk)
            results.append(alone)
        return results, failed

    def _take_smaller_steps(self, num_tokens: int) -> None:
        """There was not enough memory for a step of so many tokens."""
        fewer = max(self.scheduler.num_seats, num_tokens // 2)
        self.scheduler.max_batched_tokens = min(self.scheduler.max_batched_tokens, fewer)
        logger.warning("from now on a step has at most %d tokens", self.scheduler.max_batched_tokens)

    def _fail_without_token(self, chunk: Chunk) -> SequenceOutput:
        request_id = chunk.sequence.request.request_id
        if (trouble := self.steerings.trouble(request_id)) is not None:
            logger.info("request %s: %s", request_id, trouble)
            return self._fail(chunk, trouble, FinishReason.REFUSED)
        logger.error("request %s: %s", request_id, NO_TOKEN)
        return self._fail(chunk, NO_TOKEN)

    def _fail(self, chunk: Chunk, message: str, reason: FinishReason = FinishReason.ERROR) -> SequenceOutput:
        self.scheduler.finish(chunk.sequence, reason)
        self._forget([chunk.sequence])
        return output_of(chunk.sequence, error=message)
