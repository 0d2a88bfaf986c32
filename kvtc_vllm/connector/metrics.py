"""Counters and gauges under `vllm:kvtc_*`.

Every ratio is published as its numerator and its denominator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.logger import init_logger

from kvtc_vllm.codec.errors import CONTAINER_REASONS
from kvtc_vllm.tiers.disk import DISK_REASONS

logger = init_logger("vllm.kvtc")

COUNTERS: dict[str, str] = {
    "lookup_tokens": "Prompt tokens beyond the GPU prefix cache that were looked up",
    "hit_tokens": "Tokens of these that were found in the tier and offered as a load",
    "resumed_lookup_tokens": "As lookup_tokens, for requests that come back from preemption",
    "resumed_hit_tokens": "As hit_tokens, for requests that come back from preemption",
    "bypassed_tokens": "Prompt tokens that were not looked up: the request, its adapter or the "
    "engine's role does not allow it",
    "shared_load_waits": "Requests that waited for another request's load of the same prefix",
    "weight_changes": "Times that other weights than before were found in the running model",
    "window_tokens": "Tokens found but recomputed to keep the recent window exact",
    "stored_chunks": "Chunks encoded and kept, all ranks",
    "stored_raw_bytes": "Uncompressed KV bytes of stored chunks, all ranks",
    "stored_bytes": "Real bytes of stored chunks, all ranks",
    "loaded_chunks": "Chunks decoded into the paged cache, all ranks",
    "loaded_tokens": "Tokens written into the paged cache, all ranks",
    "loaded_raw_bytes": "Uncompressed KV bytes written into the paged cache, all ranks",
    "loaded_bytes": "Real bytes read from the tier to do so, all ranks",
    "encode_seconds": "Time spent encoding, all ranks",
    "decode_seconds": "Time spent decoding and scattering, all ranks",
    "gather_seconds": "Time that stores added to engine steps, all ranks",
    "gated_tokens": "Tokens found but recomputed because that is measured to be faster",
    "unadmitted_chunks": "Chunks not stored because too few requests have contained them",
    "promoted_chunks": "Chunks read from disk into memory, all ranks",
    "promoted_bytes": "Real bytes of these",
    "expired_waits": "Requests that stopped waiting for disk at their deadline",
    "disk_written_chunks": "Chunks written to disk, all ranks",
    "disk_written_bytes": "Real bytes of these",
    "disk_evicted_chunks": "Chunks that left the disk tier for its capacity",
    "evicted_chunks": "Chunks evicted from the tier",
    "evicted_bytes": "Real bytes of evicted chunks",
}
STORE_DROP_REASONS = (
    "staging_full",
    "out_of_memory",
    "tier_full",
    "non_finite",
    "changed",
    "error",
)
LOAD_FAILURE_REASONS = (*CONTAINER_REASONS, "changed", "error")
LABELLED: dict[str, tuple[str, tuple[str, ...]]] = {
    "dropped_stores": ("Stores given up, by reason, all ranks", STORE_DROP_REASONS),
    "disk_errors": ("Disk operations that failed, by reason, all ranks", DISK_REASONS),
    "failed_loads": ("Chunks that could not be loaded, by reason", LOAD_FAILURE_REASONS),
}
GAUGES: dict[str, str] = {
    "tier_used_bytes": "Real bytes of chunks that are ready in the memory tier, all ranks",
    "tier_reserved_bytes": "Bytes of the budget in use, reservations of running stores included",
    "tier_capacity_bytes": "Byte budget of the memory tier, all ranks",
    "tier_chunks": "Chunks in the memory tier",
    "disk_used_bytes": "Bytes of this engine's chunks on disk, all ranks",
    "disk_capacity_bytes": "Byte budget of the disk tier",
    "disk_chunks": "Chunks on disk",
}


def _key(name: str, label: str) -> str:
    return f"{name}/{label}"


KNOWN = frozenset(
    {
        *COUNTERS,
        *GAUGES,
        *(_key(name, r) for name, (_, reasons) in LABELLED.items() for r in reasons),
    }
)
"""All that is published."""
strict = False
"""Whether counting what is not published is an error, as in tests, or a line in the log."""


@dataclass
class KVTCStats(KVConnectorStats):
    """Increments since the last report, and the latest gauges."""

    def add(self, name: str, amount: float = 1, label: str | None = None) -> None:
        """Count."""
        key = name if label is None else _key(name, label)
        if key not in KNOWN:
            if strict:
                raise KeyError(f"{key} is not a metric of ours")
            logger.warning_once("kvtc: %s is counted but not published", key)
        self.data[key] = self.data.get(key, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.data[name] = value

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
        vllm_config: Any,
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
                self._children[_key(name, reason)] = self._per_engine(metric, (reason,))

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
