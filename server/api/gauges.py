"""What the server holds at the moment, read when Prometheus asks. Knows no engine: engine_metrics.py reads it."""

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Gauges:
    """One reading: families of samples by name."""

    def __init__(self) -> None:
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def set(self, name: str, meaning: str, value: float, **labels: str) -> None:
        """Add what ``name`` is now, for one set of labels."""
        if name not in self._families:
            self._families[name] = GaugeMetricFamily(name, meaning, labels=list(labels))
        self._families[name].add_metric(list(labels.values()), value)

    def total(self, name: str, meaning: str, value: float) -> None:
        """Add a number that only grows; Prometheus sees it as ``name``_total."""
        self._families[name] = CounterMetricFamily(name, meaning, value=value)

    def families(self) -> Iterable[Metric]:
        """Return all families."""
        return self._families.values()


class ScrapedGauges(Collector):
    """Reads everything anew at each scrape."""

    def __init__(self, read: Callable[[Gauges], None]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is shows at a scrape only."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the families of one reading."""
        gauges = Gauges()
        self._read(gauges)
        yield from gauges.families()


def lora_requests_info(gauges: Gauges, max_lora: int, running: Iterable[str], waiting: Iterable[str]) -> None:
    """Set vLLM's gauge, by which cluster routers find a server that has an adapter at hand.

    Value: unix time of this reading. Labels: how many adapters fit, the resident ones, those that are waited for.
    """
    gauges.set(
        "vllm:lora_requests_info",
        "Adapters at hand and waited for",
        time.time(),
        max_lora=str(max_lora),
        running_lora_adapters=",".join(sorted(running)),
        waiting_lora_adapters=",".join(sorted(waiting)),
    )


def server_load(
    gauges: Gauges,
    base_model: str,
    *,
    running: int,
    waiting: int,
    blocks: int,
    free_blocks: int,
    block_size: int,
    kv_dtype: str,
) -> None:
    """Set vLLM's gauges of load, which the Gateway API's model server protocol asks for by these names.

    The use of the KV cache is a share from 0 to 1, whatever "perc" says; a cached block that is free isn't used.
    """
    share = 1 - free_blocks / blocks
    for name, meaning, value in (
        ("vllm:num_requests_running", "Sequences that decode", running),
        ("vllm:num_requests_waiting", "Sequences that wait", waiting),
        ("vllm:kv_cache_usage_perc", "Share of the KV blocks that is used, 0 to 1", share),
    ):
        gauges.set(name, meaning, value, model_name=base_model)
    gauges.set(
        "vllm:cache_config_info",
        "Size of the KV cache",
        1,
        block_size=str(block_size),
        cache_dtype=kv_dtype,
        num_gpu_blocks=str(blocks),
    )
