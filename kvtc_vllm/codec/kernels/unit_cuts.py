"""Streams of many payloads cut into units at once."""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.entropy import MAX_UNIT_BYTES, UNIT_TARGET
from kvtc_vllm.codec.entropy.unit_table import Lengths


def cut_streams(starts: Lengths, lengths: Lengths) -> tuple[Lengths, Lengths, Lengths]:
    """Units of streams as `cut_units` cuts them: where each begins, raw bytes, streams' units.

    starts, lengths: of each stream, int64 [n].
    """
    units = np.maximum(
        np.rint(lengths / UNIT_TARGET).astype(np.int64), -(-lengths // MAX_UNIT_BYTES)
    )
    sizes = np.maximum(-(-lengths // np.maximum(units, 1)), 1)
    counts = -(-lengths // sizes)
    stream = np.repeat(np.arange(len(lengths)), counts)
    ends = counts.cumsum()
    before = (np.arange(len(stream)) - np.repeat(ends - counts, counts)) * sizes[stream]
    return starts[stream] + before, np.minimum(sizes[stream], lengths[stream] - before), counts
