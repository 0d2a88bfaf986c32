"""How long the commands behind results took."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Mapping
from typing import Any

Seconds = dict[str, dict[str, int]]
"""By command: seconds on the clock (`wall`) and of all processors together (`processor`).

Both, since on a machine that others use, or that is stopped for a while, the clock says little.
"""


class Stopwatch:
    """Seconds since it was made, of one command that measures in child processes."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._wall, self._processor = time.monotonic(), _processor()

    def read(self) -> Seconds:
        """As results have them, in whole seconds. Children count once they have ended."""
        wall, processor = time.monotonic() - self._wall, _processor() - self._processor
        return {self._command: {"wall": round(wall), "processor": round(processor)}}


def told(abouts: Iterable[Mapping[str, Any]]) -> str:
    """Sums over the commands of results, and how many of these have none: older ones.

    abouts: what results say of themselves (`command`, and `seconds` if they are known).
    """
    commands = 0
    known: list[dict[str, int]] = []
    for about in abouts:
        own = about["command"].split("; ")
        commands += len(own)
        seconds = about.get("seconds", {})
        known += [seconds[command] for command in own if command in seconds]
    wall = sum(one["wall"] for one in known)
    processor = sum(one["processor"] for one in known)
    return f"{wall} on the clock, {processor} of processors, {len(known)} of {commands} commands"


def _processor() -> float:
    """Processor seconds of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
