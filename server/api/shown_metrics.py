"""Metrics for those who may not know of every adapter: series of others' are left out, with all that they count."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

LISTS = frozenset({"running_lora_adapters", "waiting_lora_adapters"})
"""Labels that hold several adapters' names."""


class OfSome(CollectorRegistry):
    """A registry's metrics without the series of adapters that aren't ``shown``."""

    def __init__(self, whole: CollectorRegistry, shown: Callable[[str], bool]) -> None:
        super().__init__()
        self._whole = whole
        self._shown = shown

    def collect(self) -> Iterator[Metric]:
        """Yield the families, each with the samples that are left of it."""
        for family in self._whole.collect():
            kept = Metric(family.name, family.documentation, family.type, family.unit)
            kept.samples = [
                self._of_some(sample)
                for sample in family.samples
                if "adapter" not in sample.labels or self._shown(sample.labels["adapter"])
            ]
            yield kept

    def _of_some(self, sample: Sample) -> Sample:
        lists = {
            label: ",".join(name for name in sample.labels[label].split(",") if name and self._shown(name))
            for label in LISTS & sample.labels.keys()
        }
        return sample._replace(labels={**sample.labels, **lists}) if lists else sample
