"""Long loops in which other threads have their turn soon.

Python takes its lock from a thread when another has waited for 5 ms. A thread that goes through a
million files would stop the engine's by as much again and again. Shorter turns cost nothing while
nobody waits.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TURN_SECONDS = 0.001

_lock = threading.Lock()
_loops = 0
_usual = 0.0


@contextmanager
def short_turns() -> Iterator[None]:
    """While the block runs, a thread that waits for Python's lock gets it after a millisecond.

    For all threads of the process, and until the last of several such blocks ends. A shorter
    interval that somebody has set stays.
    """
    global _loops, _usual
    with _lock:
        if _loops == 0:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, TURN_SECONDS))
        _loops += 1
    try:
        yield
    finally:
        with _lock:
            _loops -= 1
            if _loops == 0:
                sys.setswitchinterval(_usual)
