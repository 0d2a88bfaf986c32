"""Threads that share a machine with the engine without slowing it.

vLLM on CPU pins its main thread to one core and gives every core to a team of OpenMP threads.
Ours may use any core, but one each: a second team in the process makes OpenMP put the waiting
threads of both to sleep, and every layer of the model then pays for waking them. A low scheduling
priority instead of `Throttle` would let a thread hold the interpreter's lock while others keep it
from running.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def thread_pool(name: str, threads: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads for work beside the engine's."""
    return ThreadPoolExecutor(
        threads, thread_name_prefix=name, initializer=_settle, initargs=(device,)
    )


def _settle(device: torch.device) -> None:
    """First thing in every thread of a pool."""
    if device.type == "cpu":
        # Of this thread; the engine's keeps its own. vLLM disables the public name of this.
        torch._C.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
    else:
        torch.cuda.set_device(device)


def on_every_thread(
    pool: ThreadPoolExecutor, threads: int, call: Callable[[], Result]
) -> list[Result]:
    """What a call gives on each of the `threads` threads of a pool, which must be idle."""
    all_here = threading.Barrier(threads)

    def run() -> Result:
        # So that no thread takes the call of another.
        all_here.wait()
        return call()

    return [future.result() for future in [pool.submit(run) for _ in range(threads)]]


class Throttle:
    """Holds a pool to a share of the CPU time while the engine computes.

    share: of one thread's time, above 0; from 1 on there is no limit.
    """

    def __init__(self, share: float) -> None:
        self._rest = max(0.0, 1.0 / share - 1.0)
        self._free = threading.Event()

    def engine_computes(self, busy: bool) -> None:
        """Called by the engine's thread in every step; an idle engine frees the pool."""
        if busy:
            self._free.clear()
        else:
            self._free.set()

    def charge(self, seconds: float) -> None:
        """Called by a thread of the pool after that much work; waits until it may go on."""
        self._free.wait(seconds * self._rest)


def share_of_thread(share: float, device: torch.device, threads: int, ranks: int) -> float:
    """Of a thread's time, if `threads` in each of `ranks` processes take `share` of the machine.

    On a GPU the threads' own work is small and there is no limit.
    """
    if device.type != "cpu":
        return 1.0
    return share * (os.cpu_count() or 1) / (threads * ranks)
