"""What a server publishes for Prometheus, as numbers."""

from __future__ import annotations

import math
import re

from kvtc_vllm.load_test.errors import LoadTestError

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: -?\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Samples = dict[str, float]
"""Sums over all label values but `reason`, which stays a part of the name: `name/reason`.
Without `_total`, as the client libraries name counters."""


def parse(page: str) -> Samples:
    """Samples of a page in Prometheus' text format.

    Raises LoadTestError if it holds none: then it is another page.
    """
    values: Samples = {}
    for line in page.splitlines():
        match = _SAMPLE.fullmatch(line.strip()) if not line.startswith("#") else None
        if match is None:
            continue
        name, labels, number = match.groups()
        try:
            value = float(number)
        except ValueError:
            continue
        reason = dict(_LABEL.findall(labels or "")).get("reason")
        key = name.removesuffix("_total") + (f"/{reason}" if reason else "")
        if not math.isnan(value):
            values[key] = values.get(key, 0.0) + value
    if not values:
        raise LoadTestError("the metrics page holds no metric in Prometheus' text format")
    return values


def increase(before: Samples, after: Samples, name: str) -> float | None:
    """How much a counter grew; None if the server does not have it.

    Raises LoadTestError if it fell: the server was started anew in between.
    """
    if name not in after:
        return None
    grown = after[name] - before.get(name, 0.0)
    if grown < 0:
        raise LoadTestError(f"{name} fell during the test: the server was started anew")
    return grown
