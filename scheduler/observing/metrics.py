"""What the engine tells Prometheus. Names and units follow Prometheus' conventions; docs/metrics.md lists them."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from scheduler.core.request import FinishReason
from scheduler.core.step import DraftKind
from scheduler.wire.messages import EngineInfo, EngineState, StepStats

MAX_USERS = 100
"""How many users have series of their own; the rest share those of `other`, so that the series stay bounded."""

OTHER = "other"

_STEP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_PHASE = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_ITL = _STEP
_TTFT = (0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_E2E = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_DRAFT = (0, 1, 2, 3, 4, 6, 8, 12, 15)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class EngineMetrics:
    """The engine's metrics for one model, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        self.registry = registry
        self._add_state()
        self._add_steps()
        self._add_clients()
        self._add_users()

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"carousel_{name}", text, ["model", *labels], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"carousel_{name}", text, ["model", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"carousel_{name}", text, ["model", *labels], registry=self.registry, buckets=buckets)

    def _add_state(self) -> None:
        """The engine, between two steps."""
        model, gauge = self._model, self._gauge
        self._info = gauge(
            "engine_info",
            "1; the labels say what was loaded, and how large the KV pool is.",
            *("device", "kv_cache_dtype", "products", "attention_backend", "block_size", "num_gpu_blocks"),
        )
        self._up = gauge("engine_up", "1 while the engine's process lives, 0 when it has ended.").labels(model)
        self._lost = self._counter(
            "engine_lost_total", "Times that the engine's process died or hung, and another one took its place."
        ).labels(model)
        self._violations = self._counter(
            "integrity_violations_total",
            "Things that did not add up in the accounts of seats and blocks; the pool was set up anew.",
        ).labels(model)
        self._num_blocks = 1
        self._num_seats = gauge("seats", "Sequences that can share a step.").labels(model)
        self._running = gauge("requests_running", "Sequences that have a seat in the batch.").labels(model)
        self._waiting = gauge("requests_waiting", "Sequences that wait for a seat.").labels(model)
        self._prompts_left = gauge(
            "prompt_tokens_remaining", "Tokens of prompts that have a seat and are still to be computed."
        ).labels(model)
        self._kv_usage = gauge(
            "kv_cache_usage_ratio",
            "Share of the KV blocks that sequences hold, 0 to 1; a cached block nobody references is free.",
        ).labels(model)
        blocks = gauge("kv_blocks", "KV blocks by state: free, cached, used.", "state")
        self._blocks = {state: blocks.labels(model, state) for state in ("free", "cached", "used")}
        self._block_size = gauge("kv_block_size_tokens", "Tokens in one KV block.").labels(model)
        self._gap = gauge(
            "fairness_gap_tokens",
            "How far apart the service of the users who wait is, per weight, in prompt tokens.",
        ).labels(model)

    def _add_steps(self) -> None:
        """What steps did."""
        model, counter, histogram = self._model, self._counter, self._histogram
        self._step = histogram("step_duration_seconds", "Time of one engine step.", _STEP).labels(model)
        phases = histogram("step_phase_duration_seconds", "Time of one phase of a step.", _PHASE, "phase")
        self._phases = {
            name: phases.labels(model, name) for name in ("plan", "execute", "sample", "commit", "publish")
        }
        self._step_tokens = histogram("step_tokens", "Tokens computed in one step.", _TOKENS).labels(model)
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens computed.").labels(model)
        self._generation_tokens = counter("generation_tokens_total", "Tokens generated.").labels(model)
        self._lookups = counter(
            "prefix_cache_query_tokens_total", "Prompt tokens that were looked up in the prefix cache."
        ).labels(model)
        self._hits = counter(
            "prefix_cache_hit_tokens_total", "Prompt tokens that the prefix cache spared."
        ).labels(model)
        self._recomputed = counter(
            "recomputed_tokens_total", "Tokens computed again, of sequences that had lost their seat."
        ).labels(model)
        self._drafted = counter(
            "drafted_tokens_total", "Tokens that were guessed, and computed to see whether they are right.", "kind"
        )
        self._accepted = counter("accepted_tokens_total", "Guessed tokens that were right.", "kind")
        self._draft_accepted = histogram(
            "draft_accepted_tokens", "Guesses of one sequence in one step that were right.", _DRAFT, "kind"
        )
        for series in (self._drafted, self._accepted, self._draft_accepted):
            for kind in get_args(DraftKind):
                series.labels(model, kind)
        preemptions = counter(
            "preemptions_total", "Sequences that lost their seat: for want of blocks, or to another user.", "cause"
        )
        self._preemptions = {cause: preemptions.labels(model, cause) for cause in ("blocks", "yielded")}

    def _add_clients(self) -> None:
        """What clients saw."""
        model, counter, histogram = self._model, self._counter, self._histogram
        finished = counter(
            "sequences_finished_total",
            "Sequences that ended, by reason: stop, length, abort, timeout, error.",
            "finish_reason",
        )
        self._finished = {reason: finished.labels(model, reason.value) for reason in FinishReason}
        self._ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT
        ).labels(model)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of one sequence.", _ITL).labels(
            model
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _E2E
        ).labels(model)
        self._queue = histogram(
            "request_queue_time_seconds", "From a request's arrival to its first seat.", _TTFT
        ).labels(model)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From a request's first seat to its first token.", _TTFT
        ).labels(model)
        self._decode = histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", _E2E
        ).labels(model)

    def _add_users(self) -> None:
        """By user."""
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self._users: set[str] = set()
        self._user_running = gauge("user_requests_running", "Requests whose first token is out, by user.", "user")
        self._user_waiting = gauge(
            "user_requests_waiting", "Requests that wait for their first token, by user.", "user"
        )
        self._user_service = counter(
            "user_service_tokens_total", "Service that a user received, in prompt tokens.", "user"
        )
        self._user_seconds = counter("user_engine_seconds_total", "A user's part of the steps' time.", "user")
        self._user_generated = counter("user_generation_tokens_total", "Tokens generated for a user.", "user")
        self._user_ttft = histogram(
            "user_time_to_first_token_seconds", "Time to the first token, by user.", _TTFT, "user"
        )
        self._refusals = counter("refusals_total", "Requests refused, by user and reason.", "user", "reason")

    def _labels(self, user: str) -> tuple[str, str]:
        """The model and the user's name, or what stands for the users beyond `MAX_USERS`."""
        if user not in self._users and len(self._users) >= MAX_USERS:
            return self._model, OTHER
        self._users.add(user)
        return self._model, user

    def record_engine(self, info: EngineInfo) -> None:
        loaded = (info.device, info.kv_cache_dtype, info.products, info.attention_backend)
        self._info.labels(self._model, *loaded, info.block_size, info.num_blocks).set(1)
        self._up.set(1)
        self._num_seats.set(info.num_seats)
        self._block_size.set(info.block_size)
        self._num_blocks = info.num_blocks

    def record_engine_lost(self) -> None:
        self._lost.inc()
        self.record_engine_end()

    def record_engine_end(self) -> None:
        """What is gone holds nothing."""
        gone = (self._up, self._running, self._waiting, self._prompts_left, self._kv_usage, self._gap)
        for gauge in (*gone, *self._blocks.values()):
            gauge.set(0)

    def record_state(self, state: EngineState) -> None:
        self._running.set(state.num_running)
        self._waiting.set(state.num_waiting)
        self._prompts_left.set(state.num_prompt_tokens_left)
        self._kv_usage.set(state.num_used_blocks / self._num_blocks)
        self._blocks["used"].set(state.num_used_blocks)
        self._blocks["cached"].set(state.num_cached_blocks)
        self._blocks["free"].set(self._num_blocks - state.num_used_blocks - state.num_cached_blocks)
        self._gap.set(state.fairness_gap)

    def record_step(self, step: StepStats, publishing: float) -> None:
        """`publishing`: seconds that the engine took to send the step before."""
        self._step.observe(step.duration)
        self._violations.inc(step.num_violations)
        self._step_tokens.observe(step.num_tokens)
        for name in ("plan", "execute", "sample", "commit"):
            self._phases[name].observe(getattr(step.phases, name))
        self._phases["publish"].observe(publishing)
        self._prompt_tokens.inc(step.num_prompt_tokens)
        self._generation_tokens.inc(step.num_sampled_tokens)
        self._lookups.inc(step.num_lookup_tokens)
        self._hits.inc(step.num_cached_tokens)
        self._recomputed.inc(step.num_recomputed_tokens)
        for draft in step.drafts:
            self._drafted.labels(self._model, draft.kind).inc(draft.num_drafted)
            self._accepted.labels(self._model, draft.kind).inc(draft.num_accepted)
            self._draft_accepted.labels(self._model, draft.kind).observe(draft.num_accepted)
        self._preemptions["yielded"].inc(step.num_yielded)
        self._preemptions["blocks"].inc(step.num_preemptions - step.num_yielded)
        for user, received in step.users.items():
            self._user_service.labels(*self._labels(user)).inc(received.service)
            self._user_seconds.labels(*self._labels(user)).inc(received.seconds)

    def record_request(self, user: str) -> None:
        """A request was submitted, and waits."""
        self._user_waiting.labels(*self._labels(user)).inc()

    def record_first_token(self, user: str, ttft: float, queue_time: float) -> None:
        self._ttft.observe(ttft)
        self._user_ttft.labels(*self._labels(user)).observe(ttft)
        self._queue.observe(queue_time)
        self._prefill.observe(ttft - queue_time)
        self._user_waiting.labels(*self._labels(user)).dec()
        self._user_running.labels(*self._labels(user)).inc()

    def record_next_token(self, seconds_since_last: float) -> None:
        self._itl.observe(seconds_since_last)

    def record_tokens(self, user: str, count: int) -> None:
        self._user_generated.labels(*self._labels(user)).inc(count)

    def record_finished_sequence(self, reason: FinishReason) -> None:
        self._finished[reason].inc()

    def record_finished_request(self, e2e: float, decode_time: float) -> None:
        """All sequences of a request ended by themselves."""
        self._e2e.observe(e2e)
        self._decode.observe(decode_time)

    def record_departure(self, user: str, *, was_running: bool) -> None:
        """A request is gone, for whatever reason."""
        requests = self._user_running if was_running else self._user_waiting
        requests.labels(*self._labels(user)).dec()

    def record_rejection(self, user: str, reason: str) -> None:
        """A request was refused: by a limit, for its deadline, or for want of a valid key."""
        self._refusals.labels(*self._labels(user), reason).inc()
