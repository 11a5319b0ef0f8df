"""How long clients wait, and how much of the promise to them is used up."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.builders.timeseries import Panel

from dashboards.page import page
from dashboards.panels import COUNT, GREEN, ORANGE, RED, SECONDS, SHARE, lines, number, spread, stacked
from dashboards.queries import ALL

BUDGET = 0.01
"""The share of tokens that may be late; the alerts in prometheus/rules.yml have it too."""


def latency() -> Dashboard:
    return (
        page(
            "latency",
            "Latency and SLO",
            "99 of 100 first tokens within 2 s, 99 of 100 others within 0.2 s: what is promised, and what is "
            "kept.",
        )
        .with_row(Row("Is the promise kept?"))
        .with_panel(
            number(
                "First tokens in time",
                "Share of first tokens within 2 s of the request, over the time range shown. The promise is 99 %.",
                SHARE,
                {"in time": _in_time("carousel_time_to_first_token_seconds", "2.0")},
                width=6,
                colours={0: RED, 1 - BUDGET: GREEN},
            )
        )
        .with_panel(
            number(
                "Other tokens in time",
                "Share of tokens within 0.2 s of the one before, over the time range shown. The promise is 99 %.",
                SHARE,
                {"in time": _in_time("carousel_inter_token_latency_seconds", "0.2")},
                width=6,
                colours={0: RED, 1 - BUDGET: GREEN},
            )
        )
        .with_panel(
            number(
                "Burn rate of first tokens, 1 h",
                "How fast the budget of late first tokens is used: at 1 it lasts exactly as long as it should, at "
                "14.4 a month's is gone in two days, and somebody is called.",
                COUNT,
                {"{{model}}": f'model:carousel_late_first_tokens:ratio_rate1h{{model=~"$model"}} / {BUDGET}'},
                width=6,
                colours={1: ORANGE, 14.4: RED},
            )
        )
        .with_panel(
            number(
                "Burn rate of other tokens, 1 h",
                "The same for the time between two tokens.",
                COUNT,
                {"{{model}}": f'model:carousel_late_tokens:ratio_rate1h{{model=~"$model"}} / {BUDGET}'},
                width=6,
                colours={1: ORANGE, 14.4: RED},
            )
        )
        .with_panel(_burn_rates("First tokens: burn rate", "model:carousel_late_first_tokens"))
        .with_panel(_burn_rates("Other tokens: burn rate", "model:carousel_late_tokens"))
        .with_row(Row("The first token"))
        .with_panel(
            lines(
                "Time to first token",
                "From a request's arrival to its first token.",
                SECONDS,
                ALL.quantiles("carousel_time_to_first_token_seconds", 0.5, 0.9, 0.99),
                width=8,
            )
        )
        .with_panel(
            spread(
                "Spread of the time to first token",
                "How many requests got their first token in which time. Two bands: some wait for a seat, and some "
                "do not.",
                SECONDS,
                "carousel_time_to_first_token_seconds",
            )
        )
        .with_panel(
            stacked(
                "Where the time of a request goes",
                "Average of each part: waiting for a first seat, computing the prompt, generating the answer.",
                SECONDS,
                {
                    "queue": ALL.mean("carousel_request_queue_time_seconds"),
                    "prompt": ALL.mean("carousel_request_prefill_time_seconds"),
                    "answer": ALL.mean("carousel_request_decode_time_seconds"),
                },
                width=8,
            )
        )
        .with_row(Row("The tokens after it, and the whole"))
        .with_panel(
            lines(
                "Between tokens",
                "The time from one token of a sequence to its next.",
                SECONDS,
                ALL.quantiles("carousel_inter_token_latency_seconds", 0.5, 0.9, 0.99),
                width=8,
            )
        )
        .with_panel(
            spread(
                "Spread of the time between tokens",
                "How many tokens came in which time after the one before. A second band above the first is "
                "usually other people's prompts.",
                SECONDS,
                "carousel_inter_token_latency_seconds",
            )
        )
        .with_panel(
            lines(
                "Whole request",
                "From a request's arrival to its last token. It grows with the length of answers: compare it with "
                "care.",
                SECONDS,
                ALL.quantiles("carousel_e2e_request_latency_seconds", 0.5, 0.9, 0.99),
                width=8,
            )
        )
    )


def _in_time(histogram: str, limit: str) -> str:
    return (
        f'sum(increase({histogram}_bucket{{model=~"$model", le="{limit}"}}[$__range])) '
        f'/ sum(increase({histogram}_count{{model=~"$model"}}[$__range]))'
    )


def _burn_rates(title: str, ratio: str) -> Panel:
    return lines(
        title,
        "Over four windows. Somebody is called when 1 h and 5 m are both above 14.4, and an alert is raised when "
        "6 h and 30 m are both above 6: the long window says that it matters, the short one that it still goes "
        "on.",
        COUNT,
        {
            f"{window} {{{{model}}}}": f'{ratio}:ratio_rate{window}{{model=~"$model"}} / {BUDGET}'
            for window in ("5m", "30m", "1h", "6h")
        },
    )
