"""What a server's /metrics says at one moment."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Exposition:
    text: str

    @cached_property
    def families(self) -> list[Metric]:
        """The metrics, without the times at which their series began."""
        families = text_string_to_metric_families(self.text)
        return [family for family in families if not family.name.endswith("_created")]

    def total(self, name: str) -> float:
        """The sum of a sample's series."""
        samples = (sample for family in self.families for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name)

    def buckets(self, histogram: str) -> dict[float, float]:
        """How many observations were at most as large as each bound."""
        samples = (sample for family in self.families if family.name == histogram for sample in family.samples)
        return {float(sample.labels["le"]): sample.value for sample in samples if "le" in sample.labels}


@dataclass(frozen=True)
class Histogram:
    """What was observed between two moments."""

    bounds: list[float]
    counts: list[float]
    """Cumulative."""

    @classmethod
    def between(cls, before: Exposition, after: Exposition, name: str) -> Histogram:
        old, new = before.buckets(name), after.buckets(name)
        return cls(list(new), [new[bound] - old[bound] for bound in new])

    @property
    def count(self) -> float:
        return self.counts[-1]

    def bucket_of_quantile(self, share: float) -> int:
        return bisect_left(self.counts, share * self.count)

    def bucket_of(self, value: float) -> int:
        return bisect_left(self.bounds, value)
