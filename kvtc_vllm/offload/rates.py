"""Seconds per token, from what was measured last."""

from __future__ import annotations

from collections import deque

WINDOW = 16
"""The newest samples count, as many as have together so many times the tokens of the largest: so
the short steps between loads, which tell of the costs of a step, soon don't push out the long ones
that tell the rate."""
MOST_SAMPLES = 256
MIN_SAMPLES = 5


class Rate:
    """Half of the tokens were not slower, and what runs is not slower either, as far as it is."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=MOST_SAMPLES)
        self.most_tokens = 0
        """Of a sample."""
        self._median = 0.0
        self._least = 0.0
        self._running = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Take note of work that has ended."""
        samples = self._samples
        samples.append((seconds / tokens, tokens))
        self.most_tokens = max(count for _, count in samples)
        total = sum(count for _, count in samples)
        while total - samples[0][1] >= WINDOW * self.most_tokens:
            total -= samples.popleft()[1]
        left = total / 2
        for value, count in sorted(samples):
            left -= count
            if left <= 0:
                self._median = value
                break
        self._running = 0.0
        if seconds / tokens < self._least:
            self._least = 0.0

    def add_running(self, tokens: int, seconds: float) -> None:
        """Take note of work that has not ended after `seconds`.

        It counts once nothing ended between two such notes, so that a moment without a processor
        tells nothing, and until work ends that was faster.
        """
        before, self._running = self._running, seconds / tokens
        self._least = max(self._least, min(before, self._running))

    @property
    def value(self) -> float:
        """Seconds per token; 0 if nothing was measured."""
        return max(self._median, self._least)

    @property
    def known(self) -> bool:
        """Whether enough has ended for one slow call to decide nothing."""
        return len(self._samples) >= MIN_SAMPLES
