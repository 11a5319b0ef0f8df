"""The PromQL of the panels. `$model` and `$user` are what the viewer chose at the top of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Queries = Mapping[str, str]
"""PromQL by the legend of what it gives."""


@dataclass(frozen=True)
class Selection:
    """The series that a page is about. `by`: the labels that are kept, none by default."""

    matchers: str

    def total(self, gauge: str, by: str = "", how: str = "sum") -> str:
        return f"{_aggregate(how, by)}({gauge}{{{self.matchers}}})"

    def rate(self, counter: str, by: str = "") -> str:
        """How much in a second."""
        return f"{_aggregate('sum', by)}(rate({counter}{{{self.matchers}}}[$__rate_interval]))"

    def increase(self, counter: str) -> str:
        """How much in the whole time that is shown."""
        return f"sum(increase({counter}{{{self.matchers}}}[$__range]))"

    def mean(self, histogram: str, by: str = "") -> str:
        return f"{self.rate(histogram + '_sum', by)} / {self.rate(histogram + '_count', by)}"

    def buckets(self, histogram: str) -> str:
        """How many observations fell into each bucket since the point before."""
        return f"sum by (le) (increase({histogram}_bucket{{{self.matchers}}}[$__rate_interval]))"

    def quantile(self, share: float, histogram: str, by: str = "") -> str:
        return f"histogram_quantile({share:g}, {self.rate(histogram + '_bucket', f'le, {by}' if by else 'le')})"

    def quantiles(self, histogram: str, *shares: float) -> Queries:
        return {f"p{100 * share:g}": self.quantile(share, histogram) for share in shares}


def _aggregate(how: str, by: str) -> str:
    return f"{how} by ({by}) " if by else how


ALL = Selection('model=~"$model"')
CHOSEN_USERS = Selection('model=~"$model", user=~"$user"')
