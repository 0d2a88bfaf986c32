"""What the worker's threads found out, until the engine's thread takes it once a step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvtc_vllm.connector.messages import WorkerReport
from kvtc_vllm.connector.metrics import KVTCStats


@dataclass
class Mail:
    """report: for the scheduler, of the present epoch; stores of an older one are of no interest
    any more. For vLLM: finished_loads, bad_blocks, stats.
    """

    report: WorkerReport = field(default_factory=lambda: WorkerReport(epoch=0))
    finished_loads: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)
    stats: KVTCStats = field(default_factory=KVTCStats)


class Mailbox:
    """Safe for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._mail = Mail()

    @contextlib.contextmanager
    def open(self) -> Iterator[Mail]:
        """Read and change what is in it; no other thread does meanwhile."""
        with self._lock:
            yield self._mail

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._mail.stats.add(name, amount)

    def ring(self) -> None:
        """There is something that an idle engine should take."""
        self._news.set()

    def wait(self, seconds: float) -> None:
        """Until somebody rings, or so long."""
        self._news.wait(seconds)

    def heard(self) -> None:
        """What was rung for is about to be taken."""
        self._news.clear()

    @property
    def epoch(self) -> int:
        """The present one, see `StepMetadata`."""
        with self._lock:
            return self._mail.report.epoch

    def begin_epoch(self, epoch: int) -> None:
        """Forget all that is for the scheduler."""
        with self._lock:
            self._mail.report = WorkerReport(epoch)

    def found_stale(self, step: int, epoch: int) -> None:
        """What computed in a step is not what the names of its epoch say."""
        with self._lock:
            if epoch == self._mail.report.epoch:
                self._mail.report.found_stale(step)
        self._news.set()

    def take_report(self, step: int) -> WorkerReport:
        """All that is for the scheduler, in the given step."""
        with self._lock:
            report = self._mail.report
            self._mail.report = WorkerReport(report.epoch)
        report.step = step
        return report

    def take_finished_loads(self) -> set[str]:
        """Requests whose loads ended, well or not."""
        with self._lock:
            finished, self._mail.finished_loads = self._mail.finished_loads, set()
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were promised but could not be filled."""
        with self._lock:
            bad, self._mail.bad_blocks = self._mail.bad_blocks, set()
        return bad

    def take_stats(self) -> KVTCStats | None:
        """Counters since the last call, if any counted."""
        with self._lock:
            if self._mail.stats.is_empty():
                return None
            stats, self._mail.stats = self._mail.stats, KVTCStats()
        return stats
