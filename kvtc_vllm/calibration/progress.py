"""Progress of a fit on the terminal: one bar per section and stage, one line per section."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

REFRESH_SECONDS = 2.0
"""Between two redraws of a bar while an eigendecomposition makes no steps."""
LOG_REFRESH_SECONDS = 60.0
"""The same where every redraw is a line of a log."""


class FitProgress:
    """A `kvtc_vllm.calibration.fit.SectionProgress` of one rank.

    Use as a context manager: a thread keeps the time on the bar running.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._bar: Any = None
        self._section = self._stage = ""
        self._started = 0.0
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __call__(self, section: str, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are done."""
        with self._lock:
            if (section, stage) != (self._section, self._stage):
                self._end_stage()
                if section != self._section:
                    self._end_section()
                self._section, self._stage, self._started = section, stage, time.monotonic()
                label = f"rank {self._rank} {section.upper()} {stage}"
                self._bar = tqdm(desc=label, total=total, leave=False, mininterval=1.0)
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> FitProgress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._end_stage()
        self._end_section()

    def _refresh(self) -> None:
        interval = REFRESH_SECONDS if sys.stderr.isatty() else LOG_REFRESH_SECONDS
        while not self._ended.wait(interval):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()

    def _end_stage(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._seconds[self._stage] = time.monotonic() - self._started

    def _end_section(self) -> None:
        if self._seconds:
            stages = ", ".join(f"{stage} {took:.1f} s" for stage, took in self._seconds.items())
            print(f"rank {self._rank} {self._section.upper()}: {stages}", flush=True)
            self._seconds = {}
