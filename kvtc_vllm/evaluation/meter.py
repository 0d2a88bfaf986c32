"""Processor seconds by what they were spent on."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

from kvtc_vllm.evaluation.reporting.results import EXACT


class Meter:
    """Of this process, all its threads together, so that other work on the machine counts little.

    Not for use by several threads, nor within itself: what runs meanwhile counts too.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, name: str = EXACT) -> Iterator[None]:
        """While this lasts, time is spent on `name`: a method, or exact runs."""
        before = time.process_time()
        try:
            yield
        finally:
            self._seconds[name] += time.process_time() - before

    def spent(self, name: str = EXACT) -> float:
        """Seconds on `name` so far."""
        return self._seconds[name]
