"""From outcomes to figures: a table, JSON, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server.bench.load import Outcome, RunResult


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of a latency, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        if not values:
            return cls(float("nan"), float("nan"), float("nan"))
        return cls(*(float(value) for value in np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good, in seconds; None: not asked for."""

    ttft: float | None = None
    itl: float | None = None
    """Mean over the request's tokens."""

    def is_kept(self, ttft: float, itls: Sequence[float]) -> bool:
        if self.ttft is not None and ttft > self.ttft:
            return False
        return self.itl is None or not itls or sum(itls) / len(itls) <= self.itl


CIRCLE = 8
"""So many words that an answer has said before, in this order, are part of a circle."""


def circles(texts: Iterable[str]) -> float:
    """The share of all runs of `CIRCLE` words that their own text has said before; 0.0 where there is none. Text
    that goes round in circles is easily guessed, so a server that guesses looks faster on it than on any other."""
    total = distinct = 0
    for text in texts:
        words = text.split()
        runs = [tuple(words[start : start + CIRCLE]) for start in range(len(words) - CIRCLE + 1)]
        total += len(runs)
        distinct += len(set(runs))
    return 1 - distinct / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in figures."""

    load: str
    """How it was loaded: the concurrency, or the arrival process and rate."""
    num_requests: int
    num_errors: int
    duration: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    goodput: float
    """Requests a second that kept the SLO."""
    ttft: Quantiles
    itl: Quantiles
    e2e: Quantiles
    circles: float
    """The share of the answers that repeats itself."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def throughput(outcomes: Sequence[Outcome]) -> float:
    """Output tokens per second, from the first request to the last answer."""
    start, end = min(outcome.sent for outcome in outcomes), max(outcome.ended for outcome in outcomes)
    return sum(outcome.num_tokens for outcome in outcomes) / (end - start)


def summarise(load: str, result: RunResult, slo: Slo) -> Summary:
    good = [outcome for outcome in result.outcomes if outcome.error is None]
    output_tokens = sum(outcome.num_tokens for outcome in good)
    prompt_tokens = sum(outcome.num_prompt_tokens for outcome in good)
    return Summary(
        load=load,
        num_requests=len(result.outcomes),
        num_errors=len(result.outcomes) - len(good),
        duration=result.duration,
        output_tokens_per_second=output_tokens / result.duration,
        total_tokens_per_second=(output_tokens + prompt_tokens) / result.duration,
        requests_per_second=len(good) / result.duration,
        goodput=sum(slo.is_kept(outcome.ttft, outcome.itls) for outcome in good) / result.duration,
        ttft=Quantiles.of([outcome.ttft for outcome in good]),
        itl=Quantiles.of([itl for outcome in good for itl in outcome.itls]),
        e2e=Quantiles.of([outcome.e2e for outcome in good]),
        circles=circles(outcome.text for outcome in good),
    )


def table(summaries: Sequence[Summary]) -> str:
    """A table for the terminal; latencies in milliseconds."""
    head = ["load", "requests", "errors", "out tok/s", "good req/s", "circles"]
    head += [f"{name} {quantile}" for name in ("TTFT", "ITL", "E2E") for quantile in ("p50", "p90", "p99")]
    rows = [head]
    for summary in summaries:
        row = [summary.load, str(summary.num_requests), str(summary.num_errors)]
        row += [f"{summary.output_tokens_per_second:.1f}", f"{summary.goodput:.2f}", f"{summary.circles:.0%}"]
        for quantiles in (summary.ttft, summary.itl, summary.e2e):
            row += [f"{1000 * value:.0f}" for value in (quantiles.p50, quantiles.p90, quantiles.p99)]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        [
            *lines,
            f"(latencies in milliseconds; circles: the share of {CIRCLE} words in a row that an answer repeats)",
        ]
    )


def draw(summaries: Sequence[Summary], results: Sequence[RunResult], file: Path) -> None:
    """Throughput against latency over all runs, and a timeline of the last one."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (tradeoff, timeline) = plt.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    throughput = [summary.output_tokens_per_second for summary in summaries]
    for name in ("p50", "p99"):
        latencies = [1000 * getattr(summary.itl, name) for summary in summaries]
        tradeoff.plot(throughput, latencies, marker="o", label=f"ITL {name}")
    for summary, x in zip(summaries, throughput, strict=True):
        tradeoff.annotate(
            summary.load, (x, 1000 * summary.itl.p99), textcoords="offset points", xytext=(4, 5), fontsize=8
        )
    tradeoff.set(
        xlabel="output tokens per second", ylabel="ms", title="throughput against latency", ylim=(0, None)
    )
    tradeoff.legend(frameon=False)

    result = results[-1]
    seconds = np.arange(0, max(1.0, result.duration), max(0.25, result.duration / 120))
    width = seconds[1] - seconds[0] if len(seconds) > 1 else 1.0
    arrivals = [at for outcome in result.outcomes for at in outcome.arrivals]
    counts, _ = np.histogram(arrivals, bins=[*seconds, seconds[-1] + width])
    in_flight = [sum(outcome.sent <= at < outcome.ended for outcome in result.outcomes) for at in seconds]
    timeline.fill_between(seconds, counts / width, step="post", color="#f2a33a", alpha=0.7)
    timeline.set(
        xlabel="seconds", ylabel="tokens per second", title=f"timeline, {summaries[-1].load}", ylim=(0, None)
    )
    flight = timeline.twinx()
    flight.step(seconds, in_flight, where="post", color="#2f6db5", linewidth=1.5)
    flight.set_ylabel("requests in flight", color="#2f6db5")
    flight.set_ylim(0, None)
    figure.savefig(file, dpi=120)
    plt.close(figure)
