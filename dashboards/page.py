"""What all dashboards share: the choices at the top, the links between them, how often they refresh."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dashboards.panels import SOURCE

TAG = "carousel"


def page(name: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty dashboard that shows the last quarter of an hour. Rows and panels are added to it, top down."""
    links = dashboard.DashboardLink("Carousel").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    return (
        dashboard.Dashboard(f"Carousel · {title}")
        .uid(f"carousel-{name}")
        .description(description)
        .tags([TAG])
        .refresh("5s")
        .time("now-15m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(links.icon("dashboard").include_vars(True).keep_time(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(choice("model", "Model", "label_values(carousel_seats, model)"))
    )


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable that the viewer sets to one, several or all of a label's values."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(True, "All", "$__all"))
    )
