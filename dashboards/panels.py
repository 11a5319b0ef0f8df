"""The few kinds of panels that the dashboards are made of, all with the same look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.queries import ALL, Queries

SOURCE = DataSourceRef("prometheus", "${datasource}")

# Units, as Grafana names them.
SECONDS, SHARE, COUNT, BYTES = "s", "percentunit", "short", "bytes"
TOKENS_A_SECOND, REQUESTS_A_SECOND, A_SECOND = "suffix: tokens/s", "reqps", "cps"

GREEN, ORANGE, RED = "green", "orange", "red"


class _Panel(Protocol):
    """What the builders of all kinds of panels have in common."""

    def title(self, title: str) -> Self: ...
    def description(self, description: str) -> Self: ...
    def unit(self, unit: str) -> Self: ...
    def datasource(self, datasource: DataSourceRef) -> Self: ...
    def targets(self, targets: list[Any]) -> Self: ...
    def span(self, w: int) -> Self: ...
    def height(self, h: int) -> Self: ...


def _describe(panel: _Panel, title: str, description: str, unit: str, width: int, height: int) -> None:
    panel.title(title).description(description).unit(unit).datasource(SOURCE).span(width).height(height)


def _query(panel: _Panel, queries: Queries) -> None:
    panel.targets(
        [
            prometheus.Dataquery().expr(expression).legend_format(legend).range().ref_id(letter)
            for letter, (legend, expression) in zip("ABCDEF", queries.items(), strict=False)
        ]
    )


def lines(
    title: str,
    description: str,
    unit: str,
    queries: Queries,
    *,
    width: int = 12,
    maximum: float | None = None,
    bound: str | None = None,
) -> timeseries.Panel:
    """Lines over time. `bound`: the legend of the one that is drawn dashed, for the others stay under it."""
    panel = _over_time().fill_opacity(8)
    _describe(panel, title, description, unit, width, 8)
    _query(panel, queries)
    if maximum is not None:
        panel.max(maximum)
    if bound is not None:
        look: dict[str, object] = {
            "custom.lineStyle": {"fill": "dash", "dash": [8, 8]},
            "custom.fillOpacity": 0,
            "color": {"mode": "fixed", "fixedColor": "text"},
        }
        panel.override_by_name(bound, [DynamicConfigValue(name, value) for name, value in look.items()])
    return panel


def stacked(
    title: str, description: str, unit: str, queries: Queries, *, width: int = 12, maximum: float | None = None
) -> timeseries.Panel:
    """Parts of a whole over time."""
    panel = _over_time().fill_opacity(45)
    panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    _describe(panel, title, description, unit, width, 8)
    _query(panel, queries)
    if maximum is not None:
        panel.max(maximum)
    return panel


def _over_time() -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    return (
        timeseries.Panel()
        .legend(legend)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .line_width(2)
        .show_points(VisibilityMode.NEVER)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
        .min(0)
    )


def seats_and_queue(width: int) -> timeseries.Panel:
    return lines(
        "Seats and queue",
        "Sequences on seats and in the queue. The dashed line is how many seats there are.",
        COUNT,
        {
            "running": ALL.total("carousel_requests_running"),
            "waiting": ALL.total("carousel_requests_waiting"),
            "seats": ALL.total("carousel_seats"),
        },
        width=width,
        bound="seats",
    )


def number(
    title: str,
    description: str,
    unit: str,
    queries: Queries,
    *,
    width: int = 4,
    colours: Mapping[float, str] | None = None,
) -> stat.Panel:
    """The present value, large, over a faint line of where it was. `colours`: which colour it has from which value
    on; below the first it is green."""
    panel = _now(colours or {}).graph_mode(BigValueGraphMode.AREA)
    _describe(panel, title, description, unit, width, 4)
    _query(panel, queries)
    return panel


def state(
    title: str, description: str, queries: Queries, words: Mapping[int, str], *, width: int = 4
) -> stat.Panel:
    """A 0 or 1 in words, red where it is 0."""
    panel = _now({0: RED, 1: GREEN}).graph_mode(BigValueGraphMode.NONE)
    panel.mappings([ValueMap({str(value): ValueMappingResult(text=word) for value, word in words.items()})])
    _describe(panel, title, description, "none", width, 4)
    _query(panel, queries)
    return panel


def labels(title: str, description: str, queries: Queries, *, width: int) -> stat.Panel:
    """What a metric's labels say."""
    panel = _now({}).graph_mode(BigValueGraphMode.NONE).text_mode(BigValueTextMode.NAME)
    _describe(panel, title, description, "none", width, 4)
    _query(panel, queries)
    return panel


def _now(colours: Mapping[float, str]) -> stat.Panel:
    steps = [Threshold(None, GREEN), *(Threshold(value, colour) for value, colour in colours.items())]
    return (
        stat.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(BigValueColorMode.VALUE)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    )


def spread(title: str, description: str, unit: str, histogram: str) -> heatmap.Panel:
    """How a histogram's observations are spread, over time: one row a bucket, darker where there are more."""
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_gap(1)
        .show_legend()
        .scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
    )
    _describe(panel, title, description, COUNT, 8, 8)
    query = (
        prometheus.Dataquery().expr(ALL.buckets(histogram)).legend_format("{{le}}").format(PromQueryFormat.HEATMAP)
    )
    panel.targets([query.range().ref_id("A")])
    return panel


def roster(title: str, description: str, label: str, queries: Queries, units: Mapping[str, str]) -> table.Panel:
    """One row for each value of `label`, one column for each query, named by its legend."""
    letters = dict(zip("ABCDEF", queries, strict=False))
    columns = {f"Value #{letter}": legend for letter, legend in letters.items()}
    panel = table.Panel().show_header(True).filterable(True)
    _describe(panel, title, description, COUNT, 24, 8)
    panel.targets(
        [
            prometheus.Dataquery()
            .expr(queries[legend])
            .legend_format(legend)
            .format(PromQueryFormat.TABLE)
            .instant()
            .ref_id(letter)
            for letter, legend in letters.items()
        ]
    )
    panel.transformations(
        [
            DataTransformerConfig("merge", options={}),
            DataTransformerConfig(
                "organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {name: place for place, name in enumerate([label, *columns])},
                    "renameByName": columns,
                },
            ),
        ]
    )
    for legend, unit in units.items():
        panel.override_by_name(legend, [DynamicConfigValue("unit", unit)])
    return panel
