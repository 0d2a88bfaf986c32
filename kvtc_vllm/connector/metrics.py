"""Our counters and gauges as vLLM collects and publishes them, under `vllm:kvtc_*`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvtc_vllm.offload.stats import (
    BY_HALVINGS,
    BY_KIND,
    CACHE_KINDS,
    COUNTERS,
    GAUGES,
    HALVINGS,
    LABELLED,
    metric_key,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class KVTCStats(KVConnectorStats):
    """The data of a `Stats` in vLLM's class."""

    def reset(self) -> None:
        """Forget all increments."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another rank's or step's increments; the newer gauge wins."""
        for key, value in other.data.items():
            self.data[key] = value if key in GAUGES else self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Values for vLLM's periodic log line."""
        values = {
            k: round(v, 3) if isinstance(v, float) else v for k, v in sorted(self.data.items())
        }
        stored = self.data.get("stored_bytes", 0)
        if stored:
            values["ratio"] = round(self.data.get("stored_raw_bytes", 0) / stored, 2)
        return values

    def is_empty(self) -> bool:
        """True if there is nothing to report."""
        return not self.data


class KVTCPromMetrics(KVConnectorPromMetrics):
    """Publishes `KVTCStats` through vLLM's own Prometheus registry."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._children: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            metric = self._counter_cls(
                name=f"vllm:kvtc_{name}", documentation=text, labelnames=labelnames
            )
            self._children[name] = self._per_engine(metric)
        for name, text in GAUGES.items():
            metric = self._gauge_cls(
                name=f"vllm:kvtc_{name}",
                documentation=text,
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
            self._children[name] = self._per_engine(metric)
        for name, (text, reasons) in LABELLED.items():
            metric = self._counter_cls(
                name=f"vllm:kvtc_{name}", documentation=text, labelnames=[*labelnames, "reason"]
            )
            for reason in reasons:
                self._children[metric_key(name, reason)] = self._per_engine(metric, (reason,))

        for label, texts, values in (
            ("kind", BY_KIND, CACHE_KINDS),
            ("times", BY_HALVINGS, HALVINGS),
        ):
            for name, text in texts.items():
                metric = self._counter_cls(
                    name=f"vllm:kvtc_{name}", documentation=text, labelnames=[*labelnames, label]
                )
                for value in values:
                    self._children[metric_key(name, value)] = self._per_engine(metric, (value,))

    def _per_engine(self, metric: Any, extra: Iterable[object] = ()) -> dict[int, Any]:
        return {
            index: metric.labels(*values, *extra)
            for index, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Called in the front-end process with one report."""
        for key, value in transfer_stats_data.items():
            child = self._children.get(key)
            if child is None:
                continue
            if key in GAUGES:
                child[engine_idx].set(value)
            elif value:
                child[engine_idx].inc(value)
