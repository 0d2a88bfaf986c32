"""Load or recompute: a load is offered only if it is expected to be faster.

A load waits for those before it, so what counts is the time until all of them and itself are
done. Both rates are medians of what this engine measured last, so that a slow first call (a
compilation, a cold page) does not decide. Until there are enough samples loads are offered while
there are only a few of them, and one in `PROBE_EVERY` always is, so that the rate of loads never
goes stale. Whatever was expected: a load that takes longer than its recomputation would have is
given up (`load_planned`).
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
UNPROVEN_LOADS = 8
"""Loads at once while it is not known what is faster: more would be a queue of unknown length."""
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
        self._running: dict[str, int] = {}
        self._queued = 0
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

    def admits(self, tokens: int) -> bool:
        """Whether to offer a load of `tokens` tokens; ask once per request."""
        if not self._enabled:
            return True
        if not (self._load.known and self._prefill.known):
            return len(self._running) < UNPROVEN_LOADS
        if (self._queued + tokens) * self._load.value <= tokens * self._prefill.value:
            return True
        self._refused += 1
        return self._refused % PROBE_EVERY == 0

    def load_planned(self, request_id: str, tokens: int) -> float:
        """Take note of a load that begins.

        Returns the seconds after which it is of no use: those of its recomputation. 0 if that is
        not known or not asked for.
        """
        self._queued += tokens - self._running.get(request_id, 0)
        self._running[request_id] = tokens
        return tokens * self._prefill.value if self._enabled and self._prefill.known else 0.0

    def load_ended(self, request_id: str) -> None:
        """Take note that a load has ended, well or not."""
        self._queued -= self._running.pop(request_id, 0)
