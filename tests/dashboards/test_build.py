"""The committed dashboards are what the code builds, and each panel explains itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dashboards.build import build, outdated
from tests.dashboards.prometheus import FOLDER, read_yaml

PAGES = {file.stem: json.loads(text) for file, text in build().items()}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, page in PAGES.items()
    for panel in page["panels"]
    if panel["type"] != "row"
]


def test_the_files_are_what_the_code_builds() -> None:
    assert outdated() == [], "run python -m dashboards.build"


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["legendFormat"]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_is_whole(page: dict[str, Any]) -> None:
    assert page["refresh"] == "5s"
    assert page["time"] == {"from": "now-15m", "to": "now"}
    assert {"datasource", "model"} <= {variable["name"] for variable in page["templating"]["list"]}
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
    places = [
        (x, y)
        for panel in page["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places), "panels overlap"
    assert all(x < 24 for x, _ in places)


def test_compose_mounts_what_there_is() -> None:
    compose = read_yaml(FOLDER / "compose.yaml")
    for service in compose["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (FOLDER / source).is_dir() if source.startswith(".") else source in compose["volumes"]
    (source,) = read_yaml(FOLDER / "provisioning/datasources/prometheus.yaml")["datasources"]
    (scrape,) = read_yaml(FOLDER / "prometheus/prometheus.yml")["scrape_configs"]
    interval = read_yaml(FOLDER / "prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval, "$__rate_interval follows from it"
    assert scrape["job_name"] == "carousel", "the rules and the panels select by it"
