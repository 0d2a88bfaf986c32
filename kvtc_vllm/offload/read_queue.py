"""How long reading from disk takes, and whether a request should wait for it."""

from __future__ import annotations

from kvtc_vllm.offload.pace import Pace
from kvtc_vllm.offload.rates import Rate

PROBE_EVERY = 16
"""After so many refusals without a read one request waits all the same: else a disk that became
fast again would never be noticed."""


class ReadQueue:
    """Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._refused = 0

    def observe(self, pace: Pace) -> None:
        """Take note of how the threads of all ranks read, in records."""
        if pace.ended:
            self._rate.add(pace.ended, pace.seconds)
            self._refused = 0
        if pace.running:
            self._rate.add_running(pace.running, pace.running_seconds)

    def worth(self, records: int, patience: float) -> bool:
        """Whether so many reads, all that run included, are expected to end within `patience`.

        Ask once per request. True while nothing is known.
        """
        if self.seconds(records) <= patience:
            return True
        self._refused += 1
        if self._refused < PROBE_EVERY:
            return False
        self._refused = 0
        return True

    def seconds(self, records: int) -> float:
        """That so many reads are expected to take; 0 while nothing is known."""
        return records * self._rate.value
