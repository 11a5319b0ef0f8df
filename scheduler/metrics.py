"""What the engine tells Prometheus. Names and units follow Prometheus' conventions."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from scheduler.messages import EngineState, StepStats
from scheduler.request import FinishReason

_STEP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_TTFT_BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class EngineMetrics:
    """The engine's metrics for one model, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model"], registry=registry).labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model"], registry=registry).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model"], registry=registry, buckets=buckets).labels(model)

        self._running = gauge("carousel_requests_running", "Sequences that have a seat in the batch.")
        self._waiting = gauge("carousel_requests_waiting", "Sequences that wait for a seat.")
        self._kv_usage = gauge(
            "carousel_kv_cache_usage_ratio",
            "Share of the KV blocks that sequences hold, 0 to 1; a cached block nobody references is free.",
        )
        self._prompt_tokens = counter("carousel_prompt_tokens_total", "Prompt tokens computed.")
        self._cached_tokens = counter(
            "carousel_prefix_cache_hit_tokens_total", "Prompt tokens that the prefix cache spared."
        )
        self._generation_tokens = counter("carousel_generation_tokens_total", "Tokens generated.")
        self._preemptions = counter(
            "carousel_preemptions_total", "Sequences that lost their seat for want of blocks."
        )
        self._finished = Counter(
            "carousel_sequences_finished_total",
            "Sequences that ended, by reason: stop, length, abort, error.",
            ["model", "finish_reason"],
            registry=registry,
        )
        self._step = histogram("carousel_step_duration_seconds", "Time of one engine step.", _STEP_BUCKETS)
        self._ttft = histogram(
            "carousel_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _TTFT_BUCKETS,
        )
        self._itl = histogram(
            "carousel_inter_token_latency_seconds", "Between two tokens of one sequence.", _ITL_BUCKETS
        )
        self._e2e = histogram(
            "carousel_e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            _E2E_BUCKETS,
        )
        self._by_reason = {reason: self._finished.labels(model, reason.value) for reason in FinishReason}

    def record_state(self, state: EngineState) -> None:
        self._running.set(state.num_running)
        self._waiting.set(state.num_waiting)
        self._kv_usage.set(state.kv_cache_usage)

    def record_step(self, step: StepStats) -> None:
        self._step.observe(step.duration)
        self._prompt_tokens.inc(step.num_prompt_tokens)
        self._cached_tokens.inc(step.num_cached_tokens)
        self._generation_tokens.inc(step.num_sampled_tokens)
        self._preemptions.inc(step.num_preemptions)

    def record_first_token(self, seconds_since_arrival: float) -> None:
        self._ttft.observe(seconds_since_arrival)

    def record_next_token(self, seconds_since_last: float) -> None:
        self._itl.observe(seconds_since_last)

    def record_finished_sequence(self, reason: FinishReason) -> None:
        self._by_reason[reason].inc()

    def record_finished_request(self, seconds_since_arrival: float) -> None:
        self._e2e.observe(seconds_since_arrival)
