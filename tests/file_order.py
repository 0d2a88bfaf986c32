"""In which order several test processes take the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

SECONDS = {"long": 100.0, "vllm": 20.0, "slow": 5.0}
"""About what a test takes, by its mark."""
OTHER_SECONDS = 0.1


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts files by what their tests take, each file's tests as they are.

    So what is left at the end are files of moments, and no process waits minutes for another's last
    engine. xdist's own order, files of many tests first, leaves those engines to the end.
    """
    seconds: Counter[object] = Counter()
    for item in items:
        seconds[item.path] += _seconds(item.get_closest_marker)  # type: ignore[assignment]
    items.sort(key=lambda item: -seconds[item.path])


def _seconds(mark: Callable[[str], object]) -> float:
    return next((cost for name, cost in SECONDS.items() if mark(name)), OTHER_SECONDS)
