"""What the steps do: the batch, the block pool, and where a step's time goes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from dashboards.page import page
from dashboards.panels import (
    A_SECOND,
    BYTES,
    COUNT,
    SECONDS,
    SHARE,
    TOKENS_A_SECOND,
    labels,
    lines,
    number,
    seats_and_queue,
    spread,
    stacked,
)
from dashboards.queries import ALL

LOADED = "{{model}} · {{products}} · {{attention_backend}} attention · {{device}}"
POOL_TOKENS = " * ".join(
    ALL.total(gauge, by="instance, model") for gauge in ("carousel_kv_blocks", "carousel_kv_block_size_tokens")
)


def scheduler() -> Dashboard:
    return (
        page("scheduler", "Scheduler and KV", "The steps, the batch and the block pool.")
        .with_row(Row("What runs"))
        .with_panel(
            labels(
                "Engine",
                "What was loaded: the model, the arithmetic of its matrix products, how attention reads the block "
                "pool, and where.",
                {LOADED: 'carousel_engine_info{model=~"$model"}'},
                width=12,
            )
        )
        .with_panel(
            number(
                "Steps",
                "Steps in a second. Each gives every running sequence one token, or computes a chunk of its "
                "prompt.",
                A_SECOND,
                {"steps": ALL.rate("carousel_step_duration_seconds_count")},
            )
        )
        .with_panel(
            number(
                "KV pool",
                "Tokens that the pool can hold: blocks times tokens in a block.",
                COUNT,
                {"tokens": f"sum({POOL_TOKENS})"},
            )
        )
        .with_panel(
            number(
                "Prefix cache",
                "Share of the prompt tokens that did not have to be computed, because somebody sent the same "
                "beginning before; over the time range shown.",
                SHARE,
                {
                    "found": f"{ALL.increase('carousel_prefix_cache_hit_tokens_total')} / "
                    f"{ALL.increase('carousel_prefix_cache_query_tokens_total')}"
                },
            )
        )
        .with_row(Row("The step"))
        .with_panel(
            lines(
                "Step duration",
                "How long a step takes. It is the time between two tokens of everybody who has a seat.",
                SECONDS,
                ALL.quantiles("carousel_step_duration_seconds", 0.5, 0.99),
                width=8,
            )
        )
        .with_panel(
            stacked(
                "Where a step's time goes",
                "Average of each phase: plan, the forward pass (execute), sample, commit, and sending the tokens "
                "to the HTTP side (publish). All but execute and sample should be thin.",
                SECONDS,
                {"{{phase}}": ALL.mean("carousel_step_phase_duration_seconds", by="phase")},
                width=8,
            )
        )
        .with_panel(
            spread(
                "Tokens in a step",
                "How large the steps are. Low rows only generate; high rows compute prompts as well.",
                COUNT,
                "carousel_step_tokens",
            )
        )
        .with_row(Row("The batch"))
        .with_panel(seats_and_queue(width=8))
        .with_panel(
            lines(
                "Tokens computed",
                "Tokens of prompts and of answers, in a second.",
                TOKENS_A_SECOND,
                {
                    "generated": ALL.rate("carousel_generation_tokens_total"),
                    "prompt": ALL.rate("carousel_prompt_tokens_total"),
                },
                width=8,
            )
        )
        .with_panel(
            stacked(
                "How sequences end",
                "Sequences that ended in a second, by reason. abort: the client went away. timeout: the deadline "
                "passed. error: the engine's log has the traceback.",
                A_SECOND,
                {"{{finish_reason}}": ALL.rate("carousel_sequences_finished_total", by="finish_reason")},
                width=8,
            )
        )
        .with_row(Row("The block pool"))
        .with_panel(
            stacked(
                "KV blocks",
                "used: sequences hold them. cached: nobody does, but a prompt that begins alike would find them. "
                "free: nothing worth keeping in them. A cached block is given away when no free one is left.",
                COUNT,
                {"{{state}}": ALL.total("carousel_kv_blocks", by="state")},
                width=8,
            )
        )
        .with_panel(
            lines(
                "Prefix cache",
                "Prompt tokens that were looked up in a second, and those among them that were found.",
                TOKENS_A_SECOND,
                {
                    "looked up": ALL.rate("carousel_prefix_cache_query_tokens_total"),
                    "found": ALL.rate("carousel_prefix_cache_hit_tokens_total"),
                },
                width=8,
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
            lines(
                "Computed again",
                "Tokens in a second that had been computed before a preemption: work that was thrown away.",
                TOKENS_A_SECOND,
                {"recomputed": ALL.rate("carousel_recomputed_tokens_total")},
                width=8,
            )
        )
        .with_panel(
            lines(
                "Guessed tokens",
                "Tokens that were guessed from what a text had said before, and those of them that were right: "
                "each of these is one step less for its sequence.",
                TOKENS_A_SECOND,
                {
                    "guessed": ALL.rate("carousel_drafted_tokens_total"),
                    "right": ALL.rate("carousel_accepted_tokens_total"),
                },
                width=8,
            )
        )
        .with_row(Row("The HTTP process"))
        .with_panel(
            lines(
                "CPU",
                "Cores that the HTTP side uses; the engine has a process of its own. Near 1 it is what holds up "
                "the streams.",
                COUNT,
                {"{{instance}}": 'rate(process_cpu_seconds_total{job="carousel"}[$__rate_interval])'},
            )
        )
        .with_panel(
            lines(
                "Memory",
                "Resident memory of the HTTP side. It should not grow from day to day.",
                BYTES,
                {"{{instance}}": 'process_resident_memory_bytes{job="carousel"}'},
            )
        )
    )
