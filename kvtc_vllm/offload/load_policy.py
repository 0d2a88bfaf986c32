"""Load or recompute: a load is offered only if it is expected to be faster.

Both rates are medians of what this engine measured last, so that a slow first call (a
compilation, a cold page) does not decide. Until there are enough samples every load is
offered, and one in `PROBE_EVERY` always is, so that the rate of loads never goes stale.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

SAMPLES = 15
"""The newest, of which the median is taken."""
MIN_SAMPLES = 5
MIN_PREFILL_TOKENS = 64
"""Steps with fewer tokens are decoding, which says nothing about prefill."""
PROBE_EVERY = 16
STEPS_IN_FLIGHT = 64
"""Steps whose time is taken at once; vLLM plans one or two ahead."""


class _Rate:
    """Median seconds per token."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)

    def add(self, tokens: int, seconds: float) -> None:
        self._samples.append(seconds / tokens)

    @property
    def known(self) -> bool:
        return len(self._samples) >= MIN_SAMPLES

    @property
    def value(self) -> float:
        return statistics.median(self._samples)


class LoadPolicy:
    """Used by the scheduler's thread only. enabled: False offers every load."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._load = _Rate()
        self._prefill = _Rate()
        self._refused = 0
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=STEPS_IN_FLIGHT)
        self._last_result = 0.0

    def observe_load(self, tokens: int, seconds: float) -> None:
        """Take note of loads of `tokens` tokens that took `seconds`, decoding and scattering."""
        if tokens:
            self._load.add(tokens, seconds)

    def step_planned(self, step: int, tokens: int) -> None:
        """Start the clock of a step that computes `tokens` tokens."""
        if tokens:
            self._steps.append((step, tokens, time.monotonic()))

    def step_ended(self, step: int) -> None:
        """Take the time of a step whose results came. Steps overlap: each counts from the last."""
        now = time.monotonic()
        while self._steps and self._steps[0][0] <= step:
            number, tokens, began = self._steps.popleft()
            if number == step:
                self.observe_step(tokens, now - max(began, self._last_result))
                self._last_result = now

    def observe_step(self, tokens: int, seconds: float) -> None:
        """Take note of a step that computed `tokens` tokens in `seconds`."""
        if tokens >= MIN_PREFILL_TOKENS:
            self._prefill.add(tokens, seconds)

    def admits(self) -> bool:
        """Whether to offer the load of a request; ask once per request."""
        if not (self._enabled and self._load.known and self._prefill.known):
            return True
        if self._load.value <= self._prefill.value:
            return True
        self._refused += 1
        return self._refused % PROBE_EVERY == 0
