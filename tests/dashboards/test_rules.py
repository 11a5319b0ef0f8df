"""The rules are right: promtool runs their own unit tests, in which each alert fires and stays silent."""

from __future__ import annotations

from tests.dashboards.conftest import Load
from tests.dashboards.prometheus import FOLDER, RULES, needs_promtool, promtool, read_yaml

TESTS = RULES.with_name("rules_test.yml")


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    promtool("check", "config", str(FOLDER / "prometheus" / "prometheus.yml"))
    promtool("check", "rules", str(RULES))


@needs_promtool
def test_each_alert_fires_and_stays_silent() -> None:
    promtool("test", "rules", str(TESTS))


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_metrics(load: Load) -> None:
    promtool("check", "metrics", input=load.after.text)


def test_each_alert_has_a_test_and_says_what_to_do() -> None:
    alerts = [rule for group in read_yaml(RULES)["groups"] for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        assert f'alertname="{alert["alert"]}", alertstate="firing"' in TESTS.read_text()
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert["annotations"]) == {"summary", "description", "action"}
