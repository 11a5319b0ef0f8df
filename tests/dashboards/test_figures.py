"""What the server says of itself is what its clients saw."""

from __future__ import annotations

import math

import pytest

from tests.dashboards.conftest import Load
from tests.dashboards.exposition import Histogram


@pytest.mark.prove
def test_tokens_are_exactly_equal(load: Load) -> None:
    def counted(name: str) -> float:
        return load.after.total(name) - load.before.total(name)

    outcomes = load.result.outcomes
    assert counted("carousel_generation_tokens_total") == sum(outcome.num_tokens for outcome in outcomes)
    assert counted("carousel_user_generation_tokens_total") == sum(outcome.num_tokens for outcome in outcomes)
    prompts = counted("carousel_prompt_tokens_total") + counted("carousel_prefix_cache_hit_tokens_total")
    assert prompts == sum(outcome.num_prompt_tokens for outcome in outcomes)
    assert counted("carousel_sequences_finished_total") == len(outcomes)


@pytest.mark.parametrize("share", [0.5, 0.99])
@pytest.mark.parametrize("what", ["time_to_first_token", "inter_token_latency", "e2e_request_latency"])
@pytest.mark.prove
def test_quantiles_agree_within_one_bucket(load: Load, what: str, share: float) -> None:
    seen = {
        "time_to_first_token": [outcome.ttft for outcome in load.result.outcomes],
        "inter_token_latency": [itl for outcome in load.result.outcomes for itl in outcome.itls],
        "e2e_request_latency": [outcome.e2e for outcome in load.result.outcomes],
    }[what]
    told = Histogram.between(load.before, load.after, f"carousel_{what}_seconds")
    ours = sorted(seen)[math.ceil(share * len(seen)) - 1]  # where the histogram's count reaches the share
    assert abs(told.bucket_of(ours) - told.bucket_of_quantile(share)) <= 1
