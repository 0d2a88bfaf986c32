"""What the worker's threads found out, until the engine's thread takes it once a step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvtc_vllm.connector.messages import WorkerReport
from kvtc_vllm.connector.metrics import KVTCStats
from kvtc_vllm.tiers.policies import ChunkKey


@dataclass
class Mail:
    """For the scheduler, see `WorkerReport`; and for vLLM: finished_loads, bad_blocks, stats.

    epoch: see `StepMetadata`; stores of an older one are of no interest any more.
    """

    epoch: int = 0
    stored: list[tuple[ChunkKey, int, int]] = field(default_factory=list)
    dropped: list[tuple[ChunkKey, int]] = field(default_factory=list)
    bad: list[ChunkKey] = field(default_factory=list)
    disk_stored: list[tuple[ChunkKey, int, int]] = field(default_factory=list)
    disk_lost: list[ChunkKey] = field(default_factory=list)
    load_tokens: int = 0
    load_seconds: float = 0.0
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

    def begin_epoch(self, epoch: int) -> None:
        """Forget all that is for the scheduler."""
        with self._lock:
            self._forget()
            self._mail.epoch = epoch

    def take_report(self, step: int) -> WorkerReport:
        """All that is for the scheduler, in the given step."""
        with self._lock:
            mail = self._mail
            report = WorkerReport(
                mail.epoch,
                mail.stored,
                mail.dropped,
                mail.bad,
                mail.disk_stored,
                mail.disk_lost,
                mail.load_tokens,
                mail.load_seconds,
                step,
            )
            self._forget()
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

    def _forget(self) -> None:
        mail = self._mail
        self._mail = Mail(
            epoch=mail.epoch,
            finished_loads=mail.finished_loads,
            bad_blocks=mail.bad_blocks,
            stats=mail.stats,
        )
