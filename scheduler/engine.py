"""EngineCore: intake, plan, execute, commit, publish. The README draws this loop."""

from __future__ import annotations

import logging
import time

from scheduler.blocks import BlockPool
from scheduler.config import EngineConfig
from scheduler.loading import load
from scheduler.messages import EngineState, SequenceOutput, StepOutputs, StepStats
from scheduler.policy import FirstComeFirstServed
from scheduler.request import FinishReason, InvalidRequestError, Request, Sequence
from scheduler.runner import Runner
from scheduler.sampler import SampledToken
from scheduler.scheduler import Chunk, Plan, Scheduler

logger = logging.getLogger(__name__)


class EngineCore:
    """One model, one block pool, one running batch. Everything happens in `step()`, in one thread."""

    def __init__(self, config: EngineConfig, model_path: str) -> None:
        """Load the model and allocate the pool. Raises what `loading.load` raises."""
        loaded = load(config, model_path)
        self.info = loaded.info
        self.pool = BlockPool(loaded.info.num_blocks, loaded.info.block_size)
        self.scheduler = Scheduler(
            self.pool,
            FirstComeFirstServed(),
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens or default_budget(config, loaded.device.type),
            max_model_len=loaded.info.max_model_len,
            vocab_size=loaded.info.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            prefix_caching=config.prefix_caching,
        )
        self.model = loaded.model
        self.runner = Runner(
            loaded.model,
            loaded.cache,
            device=loaded.device,
            num_seats=self.scheduler.num_seats,
            max_model_len=loaded.info.max_model_len,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def state(self) -> EngineState:
        return EngineState(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_cache_usage=self.pool.num_used / self.pool.num_blocks,
        )

    def add(self, request: Request) -> list[SequenceOutput]:
        """Queue a request. If it can never be served, the outputs say so; otherwise there are none yet."""
        try:
            self.scheduler.add(request)
        except InvalidRequestError as error:
            return [
                SequenceOutput(request.request_id, index, [], finish_reason=FinishReason.ERROR, error=str(error))
                for index in range(request.params.n)
            ]
        return []

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        """End a request, or one of its sequences, at once; unknown ids are ignored."""
        return [_output(sequence) for sequence in self.scheduler.abort(request_id, index)]

    def step(self) -> StepOutputs:
        """Run one step: every running sequence moves on, and those that end leave."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        sampled, outputs = self._execute(plan)
        # Taken now: committing moves the sequences on.
        sampling = plan.sampling
        num_prompt_tokens = sum(
            max(0, min(chunk.end, chunk.sequence.num_prompt_tokens) - chunk.start)
            for chunk in plan.chunks
            if chunk.sequence.num_preemptions == 0
        )
        self.scheduler.commit(plan, [token.token_id for token in sampled if token.token_id is not None])
        outputs += [_output(sequence, token) for sequence, token in zip(sampling, sampled, strict=True)]
        if not self.has_work and self.pool.num_used > 0:
            logger.error("%d blocks are in use while nothing runs: a leak, please report it", self.pool.num_used)
        step = StepStats(
            duration=time.perf_counter() - started,
            num_tokens=plan.num_tokens,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=plan.num_cached_tokens,
            num_sampled_tokens=len(sampled),
            num_preemptions=len(plan.preempted),
        )
        return StepOutputs(outputs, self.state, step)

    def _execute(self, plan: Plan) -> tuple[list[SampledToken], list[SequenceOutput]]:
        """Execute the plan. A sequence that makes it fail is taken out of the plan and ended; the others go on."""
        failed: list[SequenceOutput] = []
        try:
            sampled = self.runner.execute(plan)
        except Exception:
            # One request must not take the others with it: find out which by running them one at a time.
            logger.exception("a step of %d sequences failed; running them one at a time", len(plan.chunks))
            chunks, plan.chunks, sampled = plan.chunks, [], []
            for chunk in chunks:
                try:
                    sampled += self.runner.execute(Plan([chunk]))
                    plan.chunks.append(chunk)
                except Exception:
                    logger.exception("request %s failed", chunk.sequence.request.request_id)
                    failed.append(self._fail(chunk, "the engine failed on this request; its log says why"))
        tokens = dict(zip((sequence.key for sequence in plan.sampling), sampled, strict=True))
        for chunk in [chunk for chunk in plan.chunks if chunk.samples]:
            if tokens[chunk.sequence.key].token_id is None:
                logger.error("request %s: the model's logits are not numbers", chunk.sequence.request.request_id)
                plan.chunks.remove(chunk)
                failed.append(self._fail(chunk, "the model's output for this request is not a number"))
        return [token for token in sampled if token.token_id is not None], failed

    def _fail(self, chunk: Chunk, message: str) -> SequenceOutput:
        self.scheduler.finish(chunk.sequence, FinishReason.ERROR)
        return _output(chunk.sequence, error=message)


def _output(sequence: Sequence, sampled: SampledToken | None = None, error: str | None = None) -> SequenceOutput:
    return SequenceOutput(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=[sampled.token_id] if sampled is not None and sampled.token_id is not None else [],
        logprobs=[sampled.logprobs] if sampled is not None and sampled.logprobs is not None else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        num_cached_tokens=sequence.num_cached_tokens,
        error=error,
    )


def default_budget(config: EngineConfig, device_type: str) -> int:
    """Tokens in a step. A CPU is busy with few: more would only make everybody's next token wait for prompts."""
    return max(2048 if device_type == "cuda" else 128, 2 * config.max_num_seqs)
