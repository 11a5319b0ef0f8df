"""docs/metrics.md and the server list the same metrics."""

from __future__ import annotations

import re
from pathlib import Path

from tests.dashboards.conftest import Load

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
LINE = re.compile(r"^\| `(\w+)` \| (gauge|counter|histogram) \| ([\w, ]*)\| .+ \|$", re.MULTILINE)


def test_the_page_lists_every_metric_and_no_other(load: Load) -> None:
    on_the_page = {
        name: (kind, {label for label in labels.strip().split(", ") if label})
        for name, kind, labels in LINE.findall(PAGE.read_text())
    }
    served = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in load.after.families
    }
    assert on_the_page == served
