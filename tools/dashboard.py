"""Writes `configs/grafana/kvtc.json`, the dashboard, from the panels below.

python -m tools.dashboard
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[1] / "configs" / "grafana" / "kvtc.json"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
_WINDOW = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One graph. unit: Grafana's name of it. queries: PromQL and legend of each line."""

    title: str
    unit: str
    says: str
    queries: tuple[tuple[str, str], ...]


def rate(metric: str, by: str = "") -> str:
    """Increase per second over all engines that are chosen, by a label or summed."""
    grouped = f"sum by ({by})" if by else "sum"
    return f'{grouped}(rate({metric}{{model_name=~"$model"}}{_WINDOW}))'


def gauge(metric: str) -> str:
    """A gauge, summed over the engines that are chosen."""
    return f'sum({metric}{{model_name=~"$model"}})'


def quantile(share: float, histogram: str) -> str:
    """Of a histogram of vLLM's, in its unit."""
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', 'le')})"


PANELS = (
    Panel(
        "Compression ratio",
        "none",
        "Bytes of KV over bytes stored, of what is stored now. Below half the target: see the "
        "artifact's report, and whether the text is like the calibration's.",
        (
            (
                f"{rate('vllm:kvtc_stored_raw_bytes_total')} / "
                f"{rate('vllm:kvtc_stored_bytes_total')}",
                "stored",
            ),
            (
                f"{rate('vllm:kvtc_loaded_raw_bytes_total')} / "
                f"{rate('vllm:kvtc_loaded_bytes_total')}",
                "loaded",
            ),
        ),
    ),
    Panel(
        "Prompt tokens by where their KV comes from",
        "percentunit",
        "vLLM's own cache first, then the connector's tiers (memory, and disk by way of memory).",
        (
            (
                f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prompt_tokens_total')}",
                "vLLM's cache",
            ),
            (
                f"{rate('vllm:external_prefix_cache_hits_total')} / "
                f"{rate('vllm:prompt_tokens_total')}",
                "tiers",
            ),
        ),
    ),
    Panel(
        "Hit rate of the tiers",
        "percentunit",
        "Tokens found, of those beyond vLLM's own cache that were looked up.",
        ((f"{rate('vllm:kvtc_hit_tokens_total')} / {rate('vllm:kvtc_lookup_tokens_total')}", ""),),
    ),
    Panel(
        "Time to first token",
        "s",
        "All requests: vLLM does not tell those with a hit from those without. `kvtc bench` does "
        "so by first and later turns.",
        (
            (quantile(0.5, "vllm:time_to_first_token_seconds"), "median"),
            (quantile(0.99, "vllm:time_to_first_token_seconds"), "99th percentile"),
        ),
    ),
    Panel(
        "Memory tier",
        "bytes",
        "Used: chunks that are ready. Reserved: with stores that run.",
        (
            (gauge("vllm:kvtc_tier_used_bytes"), "used"),
            (gauge("vllm:kvtc_tier_reserved_bytes"), "reserved"),
            (gauge("vllm:kvtc_tier_capacity_bytes"), "budget"),
        ),
    ),
    Panel(
        "Disk tier",
        "bytes",
        "Zero without a disk tier.",
        (
            (gauge("vllm:kvtc_disk_used_bytes"), "used"),
            (gauge("vllm:kvtc_disk_capacity_bytes"), "budget"),
        ),
    ),
    Panel(
        "Codec rate",
        "Bps",
        "Uncompressed bytes per second of one busy thread.",
        (
            (
                f"{rate('vllm:kvtc_stored_raw_bytes_total')} / "
                f"{rate('vllm:kvtc_encode_seconds_total')}",
                "encode",
            ),
            (
                f"{rate('vllm:kvtc_loaded_raw_bytes_total')} / "
                f"{rate('vllm:kvtc_decode_seconds_total')}",
                "decode",
            ),
        ),
    ),
    Panel(
        "Codec time",
        "none",
        "Busy threads, and what stores add to engine steps. Gather is time in which the engine "
        "waits.",
        (
            (rate("vllm:kvtc_encode_seconds_total"), "encode"),
            (rate("vllm:kvtc_decode_seconds_total"), "decode"),
            (rate("vllm:kvtc_gather_seconds_total"), "gather"),
        ),
    ),
    Panel(
        "Chunks",
        "cps",
        "As many evictions as stores, and few loads: the tier is too small for the traffic.",
        (
            (rate("vllm:kvtc_stored_chunks_total"), "stored"),
            (rate("vllm:kvtc_loaded_chunks_total"), "loaded"),
            (rate("vllm:kvtc_evicted_chunks_total"), "evicted"),
            (rate("vllm:kvtc_unadmitted_chunks_total"), "not admitted"),
        ),
    ),
    Panel(
        "Dropped stores, by reason",
        "cps",
        "staging_full: more is stored than is encoded; tier_full: everything is in use.",
        ((rate("vllm:kvtc_dropped_stores_total", "reason"), "{{reason}}"),),
    ),
    Panel(
        "Failed loads, by reason",
        "cps",
        "Every one costs a recomputation and nothing else. missing: evicted in the last step.",
        ((rate("vllm:kvtc_failed_loads_total", "reason"), "{{reason}}"),),
    ),
    Panel(
        "Load policy",
        "cps",
        "Tokens per second that were found and computed all the same, and that were not looked up.",
        (
            (rate("vllm:kvtc_gated_tokens_total"), "computing is faster"),
            (rate("vllm:kvtc_window_tokens_total"), "recent window"),
            (rate("vllm:kvtc_bypassed_tokens_total"), "not allowed"),
        ),
    ),
    Panel(
        "Disk traffic",
        "Bps",
        "Stored bytes.",
        (
            (rate("vllm:kvtc_promoted_bytes_total"), "read"),
            (rate("vllm:kvtc_disk_written_bytes_total"), "written"),
        ),
    ),
    Panel(
        "Disk trouble",
        "cps",
        "Requests whose wait for disk ended at the deadline, and operations that failed.",
        (
            (rate("vllm:kvtc_expired_waits_total"), "expired waits"),
            (rate("vllm:kvtc_disk_errors_total", "reason"), "{{reason}}"),
        ),
    ),
    Panel(
        "Changes of the model's weights",
        "none",
        "Each starts a new generation: what was stored before is not found any more.",
        ((gauge("vllm:kvtc_weight_changes_total"), "changes"),),
    ),
)


def dashboard() -> dict[str, Any]:
    """As Grafana 10 and later import it."""
    return {
        "uid": "kvtc",
        "title": "KVTC",
        "tags": ["vllm", "kvtc"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "model",
                    "type": "query",
                    "label": "Model",
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "query": "label_values(vllm:kvtc_tier_capacity_bytes, model_name)",
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS)
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": source,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + place), "expr": expr, "legendFormat": legend, "datasource": source}
            for place, (expr, legend) in enumerate(panel.queries)
        ],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
