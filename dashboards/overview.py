"""The first page: is the machine full, who is waiting, and why."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from dashboards.page import page
from dashboards.panels import (
    A_SECOND,
    COUNT,
    ORANGE,
    RED,
    REQUESTS_A_SECOND,
    SECONDS,
    SHARE,
    TOKENS_A_SECOND,
    lines,
    number,
    seats_and_queue,
    stacked,
    state,
)
from dashboards.queries import ALL

SEATS_TAKEN = f"{ALL.total('carousel_requests_running')} / {ALL.total('carousel_seats')}"
KV_POOL_USED = ALL.total("carousel_kv_cache_usage_ratio", how="max")


def overview() -> Dashboard:
    return (
        page("overview", "Overview", "Is the machine full, who is waiting, and why.")
        .with_row(Row("Is the machine full?"))
        .with_panel(
            state(
                "Engine",
                "Whether the engine's process lives. When it is gone, every request is answered with status 503 "
                "and /health says why.",
                {"engine": ALL.total("carousel_engine_up", how="min")},
                {0: "down", 1: "serving"},
            )
        )
        .with_panel(
            number(
                "Seats taken",
                "Share of the seats (--max-num-seqs) that sequences sit on. At 100 % the next one waits, and each "
                "step is as useful as it can be.",
                SHARE,
                {"taken": SEATS_TAKEN},
                colours={0.8: ORANGE, 1: RED},
            )
        )
        .with_panel(
            number(
                "KV pool used",
                "Share of the KV blocks that sequences hold; of several servers, the fullest. Cached blocks that "
                "nobody holds count as free.",
                SHARE,
                {"used": KV_POOL_USED},
                colours={0.8: ORANGE, 0.95: RED},
            )
        )
        .with_panel(
            number(
                "Waiting",
                "Sequences that wait for a seat. Above zero for long, the machine is too full for what is asked "
                "of it.",
                COUNT,
                {"waiting": ALL.total("carousel_requests_waiting")},
                colours={1: ORANGE, 64: RED},
            )
        )
        .with_panel(
            number(
                "Time to first token, p99",
                "What the unluckiest one in a hundred waited for the first token of an answer.",
                SECONDS,
                ALL.quantiles("carousel_time_to_first_token_seconds", 0.99),
                colours={1: ORANGE, 2: RED},
            )
        )
        .with_panel(
            number(
                "Output",
                "Tokens generated in a second, over all requests.",
                TOKENS_A_SECOND,
                {"generated": ALL.rate("carousel_generation_tokens_total")},
            )
        )
        .with_row(Row("Who is waiting?"))
        .with_panel(seats_and_queue(width=12))
        .with_panel(
            stacked(
                "Waiting for a first token, by user",
                "Requests that have no token yet, by who sent them. One broad band is one user who sends a lot; "
                "with the fair policy that user waits, and the others do not.",
                COUNT,
                {"{{user}}": ALL.total("carousel_user_requests_waiting", by="user")},
            )
        )
        .with_row(Row("Why do they wait?"))
        .with_panel(
            lines(
                "What is full",
                "The two things that a sequence needs to run. Seats at 100 %: the batch is full. KV pool at 100 % "
                "and seats not: memory is what they wait for. Neither: users are at their own max_running.",
                SHARE,
                {"seats": SEATS_TAKEN, "KV pool": KV_POOL_USED},
                width=8,
                maximum=1,
            )
        )
        .with_panel(
            lines(
                "Preemptions",
                "Sequences that lost their seat. blocks: the KV pool was full, and what was lost is computed "
                "again. yielded: the fair policy gave the seat to a user who had less.",
                A_SECOND,
                {"{{cause}}": ALL.rate("carousel_preemptions_total", by="cause")},
                width=8,
            )
        )
        .with_panel(
            stacked(
                "Refusals",
                "Requests that were refused, by reason: a user's own limit (requests_per_minute, "
                "tokens_per_minute, user_queue), the server's (queue, queued_tokens), or a deadline that could "
                "not be met (deadline).",
                REQUESTS_A_SECOND,
                {"{{reason}}": ALL.rate("carousel_refusals_total", by="reason")},
                width=8,
            )
        )
        .with_row(Row("How well is everybody served?"))
        .with_panel(
            lines(
                "Tokens",
                "What the machine does: tokens generated, prompt tokens computed, and prompt tokens that the "
                "prefix cache spared.",
                TOKENS_A_SECOND,
                {
                    "generated": ALL.rate("carousel_generation_tokens_total"),
                    "prompt": ALL.rate("carousel_prompt_tokens_total"),
                    "cached": ALL.rate("carousel_prefix_cache_hit_tokens_total"),
                },
                width=8,
            )
        )
        .with_panel(
            lines(
                "Time to first token",
                "From a request's arrival to its first token: the wait for a seat and the prompt.",
                SECONDS,
                ALL.quantiles("carousel_time_to_first_token_seconds", 0.5, 0.99),
                width=8,
            )
        )
        .with_panel(
            lines(
                "Between tokens",
                "How smooth the streams are: the time from one token of a sequence to its next.",
                SECONDS,
                ALL.quantiles("carousel_inter_token_latency_seconds", 0.5, 0.99),
                width=8,
            )
        )
    )
