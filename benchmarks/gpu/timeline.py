"""When a load and a store end, if the host's threads and the device work beside each other.

What is launched runs later: the thread that launches does not wait for it. So the times of host and
device are not added up, but for what one of them has to have from the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST_THREADS = 8
"""Of `deflate_nvcomp.host_threads` on a server of 16 processors."""


@dataclass(frozen=True)
class HostTimes:
    """Seconds of processor time. own: of the thread that launches. others: of the host's other
    threads, whose work is shared among so many cores.

    first_upload: until a load's first blobs are sent. first_inflate: until their inflating is
    launched. after: of a store, what comes after the sizes of its units are known; what later steps
    launch is in it.
    """

    first_upload_own: float = 0.0
    first_upload_others: float = 0.0
    first_inflate_own: float = 0.0
    load_own: float = 0.0
    load_others: float = 0.0
    store_own: float = 0.0
    store_others: float = 0.0
    after: float = 0.0

    @classmethod
    def of(cls, row: Mapping[str, float], threads: int = HOST_THREADS) -> HostTimes:
        """Of a row of `host_path.measure`."""

        def times(part: str) -> tuple[float, float]:
            own = row[f"{part}_thread_ms"] / 1e3
            # The best rounds of two clocks need not be of one round.
            return own, max(0.0, row[f"{part}_cpu_ms"] / 1e3 - own) / threads

        return cls(
            *times("load_first_upload"),
            row["load_first_inflate_thread_ms"] / 1e3,
            *times("load"),
            *times("store"),
            row["store_after_device_ms"] / 1e3,
        )


NO_HOST = HostTimes()
"""With which the device alone counts."""


def load_seconds(stages: Mapping[str, float], host: HostTimes, waves: int) -> float:
    """Of a load in so many waves of one size. stages: seconds of the device by stage.

    Until the first upload, the launching thread is taken to wait for the checksums: both count.
    Then it prepares wave after wave, while blobs are uploaded on one stream, inflated on a second
    and decoded on a third. Streams are taken not to slow each other down.
    """
    work = sum(stages[name] for name in ("unpack", "decode product", "scatter"))
    begin = host.first_upload_own + host.first_upload_others
    each = (host.load_own - host.first_upload_own) / waves
    until_inflate = min(host.first_inflate_own - host.first_upload_own, each)
    uploaded = inflated = worked = 0.0
    for wave in range(waves):
        sent = begin + wave * each
        launched = sent + until_inflate
        uploaded = max(uploaded, sent) + stages["upload"] / waves
        inflated = max(inflated, uploaded, launched) + stages["inflate"] / waves
        # Its kernels are launched one by one; the last cannot end before that.
        worked = max(max(worked, inflated) + work / waves, sent + each)
    return max(worked, host.load_others)


def store_seconds(stages: Mapping[str, float], host: HostTimes) -> float:
    """Of a store. stages: seconds of the device by stage.

    The host prepares launches while the device works, and waits for the sizes of the units. What it
    does then is counted alone, as are the copy to the host after it and the blobs.
    """
    last = stages["collect"] + stages["download"]
    until_sizes = sum(
        stages[name] for name in ("gather", "encode product", "range", "pack", "deflate")
    )
    launching = host.store_own - host.after
    return max(until_sizes, launching) + host.after + last + host.store_others
