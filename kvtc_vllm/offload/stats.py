"""What is counted and measured: every counter and gauge of `vllm:kvtc_*`, in one table.

Every ratio is published as its numerator and its denominator.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache

from kvtc_vllm.codec.errors import CONTAINER_REASONS
from kvtc_vllm.tiers.delta_store import LOST
from kvtc_vllm.tiers.disk import DISK_REASONS

logger = logging.getLogger("vllm.kvtc")

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
    "short_window_loads": "Loads that left less than the recent window, for want of earlier states",
    "stored_chunks": "Chunks encoded and kept, all ranks",
    "stored_raw_bytes": "Uncompressed KV bytes of stored chunks, all ranks",
    "stored_bytes": "Real bytes of stored chunks, all ranks",
    "shared_chunks": "Chunks of these whose body was in memory already, all ranks",
    "shared_bytes": "Real bytes that were not kept again for them, all ranks",
    "delta_chunks": "Chunks of these kept as a difference from others, all ranks",
    "delta_bytes": "Real bytes that these take less than whole, all ranks",
    "loaded_chunks": "Chunks decoded into the paged cache, all ranks",
    "loaded_tokens": "Tokens written into the paged cache, all ranks",
    "loaded_raw_bytes": "Uncompressed KV bytes written into the paged cache, all ranks",
    "loaded_bytes": "Real bytes read from the tier to do so, all ranks",
    "encode_seconds": "Time spent encoding, all ranks",
    "decode_seconds": "Time spent decoding and scattering, all ranks",
    "gather_seconds": "Time that stores added to engine steps, all ranks",
    "gated_tokens": "Tokens found but recomputed because that is measured to be faster",
    "gate_waits": "Requests that waited to be computed while others were loaded",
    "unadmitted_chunks": "Chunks not stored because too few requests have contained them",
    "late_stores": "Chunks copied in the very step that takes their blocks, or after a reset",
    "reencoded_chunks": "Chunks encoded again from decoded values, after no tier had them any more",
    "promoted_chunks": "Chunks read from disk into memory, all ranks",
    "promoted_bytes": "Real bytes of these",
    "expired_waits": "Requests that stopped waiting for disk at their deadline",
    "refused_waits": "Requests that did not wait for disk: by what reads take, recomputing or the "
    "deadline would have come first",
    "disk_written_chunks": "Chunks written to disk, all ranks",
    "disk_written_bytes": "Real bytes of these",
    "disk_shared_chunks": "Chunks of these whose body was on disk already, all ranks",
    "disk_shared_bytes": "Bytes on disk that were not taken again for them, all ranks",
    "disk_halved_chunks": "Times that a chunk on disk was halved, all ranks",
    "disk_evicted_chunks": "Chunks that left the disk tier for its capacity",
    "disk_repairs": "Damaged files of the disk tier that were removed or made anew, all ranks",
    "halved_bytes": "Real bytes that halving chunks freed, all ranks",
    "evicted_chunks": "Chunks evicted from the tier",
    "evicted_bytes": "Real bytes of evicted chunks",
}
STORE_DROP_REASONS = (
    "staging_full",
    "out_of_memory",
    "tier_full",
    "overwritten",
    "non_finite",
    "changed",
    "error",
)
LOAD_FAILURE_REASONS = (
    *CONTAINER_REASONS,
    "changed",
    "late",
    "blocks",
    LOST,
    "out_of_memory",
    "error",
)
LABELLED: dict[str, tuple[str, tuple[str, ...]]] = {
    "dropped_stores": ("Stores given up, by reason, all ranks", STORE_DROP_REASONS),
    "disk_errors": ("Disk operations that failed, by reason, all ranks", DISK_REASONS),
    "failed_loads": ("Chunks that could not be loaded, by reason", LOAD_FAILURE_REASONS),
}
CACHE_KINDS = ("full", "window", "local", "latent", "state")
"""Of cache groups, see `CacheGroup.kind`."""
BY_KIND: dict[str, str] = {
    "kind_stored_raw_bytes": "As stored_raw_bytes, by kind of cache group",
    "kind_stored_bytes": "As stored_bytes, by kind of cache group",
    "kind_loaded_chunks": "As loaded_chunks, by kind of cache group",
    "kind_loaded_bytes": "As loaded_bytes, by kind of cache group",
}
HALVINGS = ("0", "1", "2", "3", "4")
"""How often a chunk was halved."""
BY_HALVINGS: dict[str, str] = {
    "halved_chunks": "Chunks halved in memory, by how often by now, all ranks",
    "halved_loaded_chunks": "As loaded_chunks, by how often the chunks were halved",
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


def metric_key(name: str, label: str) -> str:
    """Key of a labelled counter in `Stats.data`."""
    return f"{name}/{label}"


KNOWN = frozenset(
    {
        *COUNTERS,
        *GAUGES,
        *(metric_key(name, r) for name, (_, reasons) in LABELLED.items() for r in reasons),
        *(metric_key(name, kind) for name in BY_KIND for kind in CACHE_KINDS),
        *(metric_key(name, times) for name in BY_HALVINGS for times in HALVINGS),
    }
)
"""All that is published."""
strict = False
"""Whether counting what is not published is an error, as in tests, or a line in the log."""


@dataclass
class Stats:
    """Increments since the last report, and the latest gauges, by `metric_key` or name."""

    data: dict[str, int | float] = field(default_factory=dict)

    def add(self, name: str, amount: float = 1, label: str | None = None) -> None:
        """Add to a counter."""
        key = name if label is None else metric_key(name, label)
        if key not in KNOWN:
            if strict:
                raise KeyError(f"{key} is not a metric of ours")
            _warn_unpublished(key)
        self.data[key] = self.data.get(key, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.data[name] = value

    def is_empty(self) -> bool:
        """True if there is nothing to report."""
        return not self.data


@cache
def _warn_unpublished(key: str) -> None:
    """Say it once per process."""
    logger.warning("kvtc: %s is counted but not published", key)
