"""What a running server's metrics say of its connector: `kvtc doctor URL`."""

from __future__ import annotations

import urllib.error
import urllib.request

from kvtc_vllm.cli.checks import Checks
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.metrics_page import Samples, parse

SECONDS = 10.0
LEAST_OF_TARGET = 0.5
"""Of the target ratio; below, the text is unlike the calibration's or something is wrong."""
MOST_DROPPED = 0.1
"""Share of stores that may be given up."""


def is_url(text: str) -> bool:
    """True for what `read_page` takes."""
    return text.startswith(("http://", "https://"))


def read_page(url: str) -> Samples:
    """Metrics of a server, by its address with or without `/metrics`. Raises LoadTestError."""
    address = url.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as response:
            page = response.read().decode(errors="replace")
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise LoadTestError(f"{address} cannot be read: {reason}") from error
    return parse(page)


def check_server(samples: Samples, checks: Checks, ratio: float | None) -> None:
    """One line per question, of all since the server's start. ratio: target; None: not told."""
    if "vllm:kvtc_tier_capacity_bytes" not in samples:
        checks.add(
            False,
            "connector",
            "no metric begins with vllm:kvtc_: the server was started without --kv-transfer-config",
        )
        return
    counters = _Counters(samples)
    checks.add(True, "connector", "its metrics are published")
    _ratio(counters, checks, ratio)
    _stores(counters, checks)
    _loads(counters, checks)
    _hits(counters, checks)
    _memory(counters, checks)
    _disk(counters, checks)
    changes = counters["weight_changes"]
    if changes:
        checks.add(None, "weights", f"exchanged {changes:,.0f} times; older chunks are not used")


class _Counters:
    """Values of `vllm:kvtc_*` by what follows; 0 where there is none."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, name: str) -> float:
        return self._samples.get(f"vllm:kvtc_{name}", 0.0)

    def reasons(self, name: str) -> dict[str, float]:
        """Of a counter with reasons, those that are not 0, the most frequent first."""
        prefix = f"vllm:kvtc_{name}/"
        found = {
            k.removeprefix(prefix): v for k, v in self._samples.items() if k.startswith(prefix)
        }
        return {k: v for k, v in sorted(found.items(), key=lambda one: -one[1]) if v}


def _named(reasons: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:,.0f}" for name, count in reasons.items())


def _ratio(counters: _Counters, checks: Checks, target: float | None) -> None:
    stored = counters["stored_bytes"]
    if not stored:
        checks.add(None, "ratio", "nothing is stored yet")
        return
    real = counters["stored_raw_bytes"] / stored
    if target is None:
        checks.add(None, "ratio", f"{real:.2f} bytes of KV per byte stored")
        return
    checks.add(
        real >= LEAST_OF_TARGET * target,
        "ratio",
        f"{real:.2f} bytes of KV per byte stored, the target is {target:g}",
    )


def _stores(counters: _Counters, checks: Checks) -> None:
    dropped = counters.reasons("dropped_stores")
    stored, given_up = counters["stored_chunks"], sum(dropped.values())
    share = given_up / (stored + given_up) if given_up else 0.0
    reasons = f" ({_named(dropped)})" if dropped else ""
    checks.add(
        share <= MOST_DROPPED,
        "stores",
        f"{stored:,.0f} chunks, {share:.1%} given up{reasons}",
    )


def _loads(counters: _Counters, checks: Checks) -> None:
    failed = counters.reasons("failed_loads")
    # A chunk may be evicted between lookup and load; that is no damage.
    damaged = any(reason != "missing" for reason in failed)
    reasons = f", failed: {_named(failed)}" if failed else ""
    checks.add(not damaged, "loads", f"{counters['loaded_chunks']:,.0f} chunks{reasons}")


def _hits(counters: _Counters, checks: Checks) -> None:
    asked, found = counters["lookup_tokens"], counters["hit_tokens"]
    if not asked:
        checks.add(None, "hits", "no prompt went beyond vLLM's own cache yet")
        return
    gated = counters["gated_tokens"]
    text = f"{found / asked:.1%} of the {asked:,.0f} tokens that were looked up"
    if gated:
        text += f"; {gated:,.0f} more were found but computed, because that is faster"
    checks.add(None, "hits", text)


def _memory(counters: _Counters, checks: Checks) -> None:
    used, capacity = counters["tier_used_bytes"], counters["tier_capacity_bytes"]
    if not capacity:
        checks.add(None, "memory", "the tier has not reported its size yet: ask it something first")
        return
    text = (
        f"{used / 2**20:,.0f} of {capacity / 2**20:,.0f} MiB, {counters['tier_chunks']:,.0f} chunks"
    )
    evicted, stored = counters["evicted_chunks"], counters["stored_chunks"]
    if evicted:
        text += f", {evicted / stored:.0%} of what was stored is evicted" if stored else ""
    checks.add(None, "memory", text)


def _disk(counters: _Counters, checks: Checks) -> None:
    errors = counters.reasons("disk_errors")
    capacity = counters["disk_capacity_bytes"]
    if not capacity and not errors:
        checks.add(None, "disk", "no disk tier")
        return
    text = f"{counters['disk_used_bytes'] / 2**20:,.0f} of {capacity / 2**20:,.0f} MiB"
    if errors:
        text += f", failed: {_named(errors)}"
    waits = counters["expired_waits"]
    if waits:
        text += f", {waits:,.0f} requests stopped waiting for it at their deadline"
    checks.add(not errors and not waits, "disk", text)
