"""Every query of every panel and every rule gives data, asked of a real Prometheus beside a real server."""

from __future__ import annotations

import json
import math
import re

import pytest

from dashboards.build import build
from tests.dashboards.conftest import Load
from tests.dashboards.prometheus import RULES, Prometheus, needs_promtool, read_yaml

PANEL_QUERIES = [
    pytest.param(target["expr"], id=f"{file.stem}: {panel['title']}, {target['legendFormat']}")
    for file, text in build().items()
    for panel in json.loads(text)["panels"]
    for target in panel.get("targets", [])
]
RULES_BY_NAME = {
    rule.get("record") or rule["alert"]: rule for group in read_yaml(RULES)["groups"] for rule in group["rules"]
}
VARIABLES = {"$model": ".*", "$user": ".*", "$__rate_interval": "4s", "$__range": "30s"}


def substituted(query: str) -> str:
    """As Grafana would send it."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query


async def assert_has_data(prometheus: Prometheus, query: str, load: Load) -> None:
    series = await prometheus.values_since(query, load.start, load.end + 1)
    assert series, f"no series: {query}"
    assert any(math.isfinite(value) for values in series for value in values), f"no numbers: {query}"


@needs_promtool
@pytest.mark.parametrize("query", PANEL_QUERIES)
async def test_a_panel_has_data(query: str, prometheus: Prometheus, load: Load) -> None:
    await assert_has_data(prometheus, substituted(query), load)


@needs_promtool
@pytest.mark.parametrize("name", RULES_BY_NAME)
async def test_a_rule_has_data(name: str, prometheus: Prometheus, load: Load) -> None:
    query = RULES_BY_NAME[name]["expr"]
    if "alert" in RULES_BY_NAME[name]:
        # An alert that does not fire gives nothing. With `bool` its comparisons give 0 instead, if both sides have
        # data and their labels match.
        query = re.sub(r"(==|>)(?! bool)", r"\1 bool", query)
    await assert_has_data(prometheus, query, load)
