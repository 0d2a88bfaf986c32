"""What the host cannot leave out of a load and a store: one copy and one checksum of every blob."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvtc_vllm.codec.container import CHECKSUM_BYTES, checksum
from kvtc_vllm.codec.entropy import aligned


def floor_ms(sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """Milliseconds of this thread, best of the rounds, for blobs of so many bytes.

    store: bodies that lie side by side become blobs, and the checksum of each is taken. load: blobs
    are put side by side, and the checksum of what lies there is taken. All memory was written
    before, none is allocated.
    """
    together = np.zeros(sum(map(aligned, sizes)), np.uint8)
    blobs = [np.zeros(size, np.uint8) for size in sizes]
    ends = np.cumsum([aligned(size) for size in sizes]).tolist()
    places = [together[end - aligned(size) :][:size] for end, size in zip(ends, sizes, strict=True)]

    def move(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)
            checksum(target.data[:-CHECKSUM_BYTES])

    return {
        "store_floor_ms": _best(lambda: move(places, blobs), rounds),
        "load_floor_ms": _best(lambda: move(blobs, places), rounds),
    }


def _best(call: Callable[[], None], rounds: int) -> float:
    times: list[float] = []
    for _ in range(rounds):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return round(min(times) * 1e3, 3)
