"""`carousel top`: a running server in the terminal, redrawn every second from its /metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Labels = frozenset[tuple[str, str]]


class TopError(RuntimeError):
    """There is no Carousel server at that address; the message says what answered instead."""


@dataclass(frozen=True, slots=True)
class Reading:
    """All samples of one look at /metrics, by name and labels."""

    at: float
    samples: dict[str, dict[Labels, float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, at: float) -> Reading:
        reading = cls(at)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = frozenset((name, value) for name, value in sample.labels.items() if name != "model")
                reading.samples.setdefault(sample.name, {})[labels] = sample.value
        return reading

    def value(self, name: str, **labels: str) -> float:
        """The sum over all samples that have these labels."""
        wanted = set(labels.items())
        return sum(value for key, value in self.samples.get(f"carousel_{name}", {}).items() if wanted <= key)

    def labels(self, name: str, label: str) -> list[str]:
        """The values that a label takes."""
        keys = self.samples.get(f"carousel_{name}", {})
        return sorted({value for key in keys for known, value in key if known == label})


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two readings."""

    before: Reading
    after: Reading

    def rate(self, name: str, **labels: str) -> float:
        """Increase of a counter a second."""
        increase = self.after.value(name, **labels) - self.before.value(name, **labels)
        return max(0.0, increase) / max(1e-9, self.after.at - self.before.at)

    def quantile(self, name: str, share: float) -> float | None:
        """A quantile of a histogram's new observations, as Prometheus estimates it; None if there are none."""
        counts = sorted(self._buckets(name))
        total = counts[-1][1] if counts else 0.0
        if total <= 0:
            return None
        low, below = 0.0, 0.0
        for bound, count in counts:
            if count >= share * total:
                return (
                    low
                    if bound == float("inf")
                    else low + (bound - low) * (share * total - below) / (count - below)
                )
            low, below = bound, count
        return low

    def _buckets(self, name: str) -> Iterator[tuple[float, float]]:
        old = self.before.samples.get(f"carousel_{name}_bucket", {})
        for key, count in self.after.samples.get(f"carousel_{name}_bucket", {}).items():
            yield float(dict(key)["le"]), count - old.get(key, 0.0)


async def top(url: str, interval: float, *, once: bool) -> None:
    """Redraw until cancelled, or print one picture over one interval. Raises `TopError`."""
    console = Console()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        before = await _read(session, url)
        if once:
            await asyncio.sleep(interval)
            console.print(picture(url, Interval(before, await _read(session, url))))
            return
        with Live(
            picture(url, Interval(before, before)), console=console, screen=True, auto_refresh=False
        ) as live:
            while True:
                await asyncio.sleep(interval)
                after = await _read(session, url)
                live.update(picture(url, Interval(before, after)), refresh=True)
                before = after


async def _read(session: aiohttp.ClientSession, url: str) -> Reading:
    address = url.rstrip("/") + "/metrics"
    try:
        async with session.get(address) as response:
            text = await response.text()
            response.raise_for_status()
        reading = Reading.parse(text, time.monotonic())
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise TopError(f"cannot read {address}: {error}") from error
    if "carousel_seats" not in reading.samples:
        raise TopError(f"{address} has no metrics of Carousel's")
    return reading


def picture(url: str, over: Interval) -> RenderableType:
    """Everything on one screen."""
    return Panel(
        Group(_fill(over), Text(), _speed(over), Text(), _users(over)),
        title=f"carousel · {url}",
        subtitle="Ctrl-C leaves",
        title_align="left",
        subtitle_align="right",
    )


def _fill(over: Interval) -> RenderableType:
    """How full the batch and the block pool are, who waits, and for how long yet prompts are computed."""
    now, left = over.after, over.after.value("prompt_tokens_remaining")
    seats, running = now.value("seats"), now.value("requests_running")
    blocks = {state: now.value("kv_blocks", state=state) for state in ("used", "cached", "free")}
    table = Table.grid(padding=(0, 2))
    table.add_column(width=8)
    table.add_column(width=40)
    table.add_column()
    table.add_row("seats", ProgressBar(seats, running, width=40), f"{running:.0f} of {seats:.0f} taken")
    table.add_row(
        "blocks",
        ProgressBar(sum(blocks.values()), blocks["used"], width=40),
        f"{blocks['used']:.0f} used, {blocks['cached']:.0f} cached, {blocks['free']:.0f} free",
    )
    table.add_row("waiting", "", f"{now.value('requests_waiting'):.0f}")
    rate = over.rate("prompt_tokens_total")
    takes = f", about {left / rate:.0f} s" if left and rate else ""
    table.add_row("prompts", "", f"{left:.0f} tokens to be computed{takes}")
    return table


def _speed(over: Interval) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "p50", "p99", "", "a second"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    rates = [
        ("tokens generated", over.rate("generation_tokens_total")),
        ("prompt tokens", over.rate("prompt_tokens_total")),
        ("cached tokens", over.rate("prefix_cache_hit_tokens_total")),
        ("guessed tokens", over.rate("drafted_tokens_total")),
        ("right guesses", over.rate("accepted_tokens_total")),
        ("steps", over.rate("step_duration_seconds_count")),
        ("preemptions", over.rate("preemptions_total")),
    ]
    latencies = [
        ("time to first token", "time_to_first_token_seconds"),
        ("between tokens", "inter_token_latency_seconds"),
        ("step", "step_duration_seconds"),
        ("queue", "request_queue_time_seconds"),
        ("prompt", "request_prefill_time_seconds"),
        ("answer", "request_decode_time_seconds"),
        ("whole request", "e2e_request_latency_seconds"),
    ]
    for (title, name), (what, rate) in zip(latencies, rates, strict=True):
        table.add_row(
            title, *(_time(over.quantile(name, share)) for share in (0.5, 0.99)), f"   {what}", f"{rate:.1f}"
        )
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _users(over: Interval) -> RenderableType:
    """Who is served, the busiest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("user")
    for heading in ("running", "waiting", "tokens/s", "share of service", "refused/s"):
        table.add_column(heading, justify="right")
    users = over.after.labels("user_requests_waiting", "user")
    service = {user: over.rate("user_service_tokens_total", user=user) for user in users}
    total = sum(service.values()) or 1.0
    for user in sorted(users, key=lambda user: -service[user])[:20]:
        table.add_row(
            user,
            f"{over.after.value('user_requests_running', user=user):.0f}",
            f"{over.after.value('user_requests_waiting', user=user):.0f}",
            f"{over.rate('user_generation_tokens_total', user=user):.1f}",
            f"{service[user] / total:.0%}",
            f"{over.rate('refusals_total', user=user):.1f}",
        )
    return table
