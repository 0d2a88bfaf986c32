"""What one process coded, loaded and refused: counted, logged once, shown as metrics."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

# LMCache sets this logger up like its own; without LMCache it is an ordinary logger.
logger = logging.getLogger("lmcache.kvtc")

_LOGGED_REASONS = 256
"""Distinct messages remembered; when full, nothing new is logged at all."""


class Counters:
    """Thread-safe counts by name, or by "name/reason"."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()
        self._logged: set[str] = set()

    def add(self, name: str, amount: int = 1) -> None:
        """Raise the count of `name`, or of "name/reason", by `amount`."""
        with self._lock:
            self._values[name] += amount

    def warn(self, name: str, message: str) -> None:
        """Raise a count by one and log the message, unless the same was logged before."""
        with self._lock:
            self._values[name] += 1
            known = message in self._logged or len(self._logged) >= _LOGGED_REASONS
            if not known:
                self._logged.add(message)
        if not known:
            logger.warning("kvtc: %s (logged once, counted as %s)", message, name)

    def snapshot(self) -> dict[str, int]:
        """A copy of all counts, in order of their names."""
        with self._lock:
            return dict(sorted(self._values.items()))


class _Collector(Collector):
    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def describe(self) -> list[CounterMetricFamily]:
        """Nothing in advance: names come with the first count."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family per name, with a label for counts by reason."""
        families: dict[str, dict[str, int]] = defaultdict(dict)
        for name, value in self._counters.snapshot().items():
            family, _, reason = name.partition("/")
            families[family][reason] = value
        for family, values in families.items():
            labelled = any(values)
            metric = CounterMetricFamily(
                f"lmcache_kvtc_{family}",
                f"KVTC in LMCache: {family.replace('_', ' ')}",
                labels=["reason"] if labelled else [],
            )
            for reason, value in values.items():
                metric.add_metric([reason] if labelled else [], value)
            yield metric


def export_counters(counters: Counters) -> None:
    """Show these counters on the Prometheus page as lmcache_kvtc_*. Call it once per process."""
    REGISTRY.register(_Collector(counters))
