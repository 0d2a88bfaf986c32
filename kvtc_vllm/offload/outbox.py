"""What the worker's threads found out, until the engine's thread takes it once per step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvtc_vllm.offload.messages import WorkerReport
from kvtc_vllm.offload.stats import Stats


@dataclass
class News:
    """What has happened since it was last taken."""

    report: WorkerReport = field(default_factory=lambda: WorkerReport(epoch=0))
    """For the scheduler, of the present epoch; stores of an older one are of no interest."""
    finished_loads: set[str] = field(default_factory=set)
    """For vLLM: requests whose loads ended, well or not."""
    failed_loads: set[str] = field(default_factory=set)
    """For vLLM: those of them that did not end well."""
    bad_blocks: set[int] = field(default_factory=set)
    """For vLLM: blocks that were promised but could not be filled."""
    stats: Stats = field(default_factory=Stats)


class Outbox:
    """Collects `News`. Safe for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = threading.Event()
        self._news = News()
        self._cut: WorkerReport | None = None
        """What the counters that were taken in this step are of."""

    @contextlib.contextmanager
    def open(self) -> Iterator[News]:
        """Read and change what is in it; no other thread does meanwhile."""
        with self._lock:
            yield self._news

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._news.stats.add(name, amount)

    def notify(self) -> None:
        """End the wait of an idle engine, now or at its next `wait`."""
        self._waiting.set()

    def wait(self, seconds: float) -> None:
        """Block until `notify`, for at most so long."""
        self._waiting.wait(seconds)

    def clear(self) -> None:
        """Let `wait` block again. Call before the news are taken, so that none is missed."""
        self._waiting.clear()

    @property
    def epoch(self) -> int:
        """The present one, see `StepMetadata`."""
        with self._lock:
            return self._news.report.epoch

    def begin_epoch(self, epoch: int) -> None:
        """Drop all that is for the scheduler."""
        with self._lock:
            self._news.report, self._cut = WorkerReport(epoch), None

    def found_stale(self, step: int, epoch: int) -> None:
        """Report that what computed in a step is not what the names of its epoch say."""
        with self._lock:
            if epoch == self._news.report.epoch:
                self._news.report.found_stale(step)
        self._waiting.set()

    def tell_adapters(self, digests: Mapping[int, bytes | None], rank: int) -> None:
        """Report what a rank's LoRA adapters are, see `WorkerReport`."""
        if digests:
            with self._lock:
                for number, digest in digests.items():
                    self._news.report.adapters[number] = {rank: digest}

    def take_report(self, step: int) -> WorkerReport:
        """All that is for the scheduler, in the given step.

        Of a step that took its counters already, what these count and no more: who waits until a
        store was reported finds it counted.
        """
        with self._lock:
            report, self._cut = self._cut or self._cut_off(), None
        report.step = step
        return report

    def _cut_off(self) -> WorkerReport:
        report = self._news.report
        self._news.report = WorkerReport(report.epoch)
        return report

    def take_finished_loads(self) -> set[str]:
        """Requests whose loads ended, well or not."""
        with self._lock:
            finished, self._news.finished_loads = self._news.finished_loads, set()
        return finished

    def take_failed_loads(self, finished: set[str]) -> set[str]:
        """Those of the requests in `finished` whose loads did not end well."""
        with self._lock:
            failed = self._news.failed_loads & finished
            self._news.failed_loads -= failed
        return failed

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were promised but could not be filled."""
        with self._lock:
            bad, self._news.bad_blocks = self._news.bad_blocks, set()
        return bad

    def take_stats(self) -> Stats | None:
        """Counters since the last call, if any counted."""
        with self._lock:
            if self._cut is None:
                self._cut = self._cut_off()
            if self._news.stats.is_empty():
                return None
            stats, self._news.stats = self._news.stats, Stats()
        return stats
