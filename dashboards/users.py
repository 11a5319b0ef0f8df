"""Who uses the machine, who waits, and whether the shares are fair."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from dashboards.page import choice, page
from dashboards.panels import (
    COUNT,
    REQUESTS_A_SECOND,
    SECONDS,
    SHARE,
    TOKENS_A_SECOND,
    lines,
    roster,
    stacked,
)
from dashboards.queries import ALL, CHOSEN_USERS

TTFT = "carousel_user_time_to_first_token_seconds"


def users() -> Dashboard:
    service = CHOSEN_USERS.rate("carousel_user_service_tokens_total", by="user")
    everybody = ALL.rate("carousel_user_service_tokens_total")
    share = f"{service} / on () group_left () {everybody}"
    return (
        page("users", "Users", "Who uses the machine, who waits, and whether the shares are fair.")
        .with_variable(
            choice("user", "User", 'label_values(carousel_user_requests_waiting{model=~"$model"}, user)')
        )
        .with_row(Row("Now"))
        .with_panel(
            roster(
                "Users",
                "Everybody who has sent a request since the server started; sort by a click on a heading. Share: "
                "of the service that all users together receive. Users beyond the first hundred are one row, "
                "other.",
                "user",
                {
                    "running": CHOSEN_USERS.total("carousel_user_requests_running", by="user"),
                    "waiting": CHOSEN_USERS.total("carousel_user_requests_waiting", by="user"),
                    "tokens/s": CHOSEN_USERS.rate("carousel_user_generation_tokens_total", by="user"),
                    "share": share,
                    "first token, p50": CHOSEN_USERS.quantile(0.5, TTFT, by="user"),
                    "refused/s": CHOSEN_USERS.rate("carousel_refusals_total", by="user"),
                },
                {"tokens/s": COUNT, "share": SHARE, "first token, p50": SECONDS, "refused/s": COUNT},
            )
        )
        .with_row(Row("Who waits, and who rides"))
        .with_panel(
            stacked(
                "Waiting, by user",
                "Requests that have no token yet.",
                COUNT,
                {"{{user}}": CHOSEN_USERS.total("carousel_user_requests_waiting", by="user")},
            )
        )
        .with_panel(
            stacked(
                "Running, by user",
                "Requests whose answer has begun.",
                COUNT,
                {"{{user}}": CHOSEN_USERS.total("carousel_user_requests_running", by="user")},
            )
        )
        .with_row(Row("Is it fair?"))
        .with_panel(
            stacked(
                "Share of the service",
                "Service counts prompt tokens, and output tokens at their price. Users of the same weight who all "
                "want more have bands of the same height; with twice the weight a band is twice as high.",
                SHARE,
                {"{{user}}": share},
                width=8,
                maximum=1,
            )
        )
        .with_panel(
            lines(
                "Fairness gap",
                "How far apart the users who wait are in service received per weight, in prompt tokens. It stays "
                "bounded however long the queue is, unless the policy is not the fair one.",
                COUNT,
                {"{{model}}": ALL.total("carousel_fairness_gap_tokens", by="model", how="max")},
                width=8,
            )
        )
        .with_panel(
            stacked(
                "Engine time",
                "A user's part of the steps' time; at 100 % the engine is never idle.",
                SHARE,
                {"{{user}}": CHOSEN_USERS.rate("carousel_user_engine_seconds_total", by="user")},
                width=8,
            )
        )
        .with_row(Row("What do they get?"))
        .with_panel(
            stacked(
                "Tokens, by user",
                "Tokens generated in a second.",
                TOKENS_A_SECOND,
                {"{{user}}": CHOSEN_USERS.rate("carousel_user_generation_tokens_total", by="user")},
                width=8,
            )
        )
        .with_panel(
            lines(
                "Time to first token, by user",
                "Median and 99th percentile. Somebody who sends little should not wait for somebody who sends a "
                "lot.",
                SECONDS,
                {
                    "p50 {{user}}": CHOSEN_USERS.quantile(0.5, TTFT, by="user"),
                    "p99 {{user}}": CHOSEN_USERS.quantile(0.99, TTFT, by="user"),
                },
                width=8,
            )
        )
        .with_panel(
            stacked(
                "Refusals, by user and reason",
                "Whose requests were refused, and why: requests_per_minute, tokens_per_minute, user_queue are "
                "limits of the user; queue and queued_tokens are the server's; deadline could not be met.",
                REQUESTS_A_SECOND,
                {"{{user}} · {{reason}}": CHOSEN_USERS.rate("carousel_refusals_total", by="user, reason")},
                width=8,
            )
        )
    )
