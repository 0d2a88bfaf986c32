"""Marked tokens of many chunks, counted at once."""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.kernels.payload_coding import NO_MARKS, count_marked


def test_chunks_of_any_length_are_counted_alone() -> None:
    draws = np.random.default_rng(5)
    marks = [draws.random(size) < 0.5 for size in (3, 1, 128, 124, 7)]
    marks += [np.zeros(4, np.bool_), np.ones(9, np.bool_), NO_MARKS, np.ones(1, np.bool_), NO_MARKS]
    assert count_marked(marks).tolist() == [int(own.sum()) for own in marks]
    assert count_marked([NO_MARKS, NO_MARKS]).tolist() == [0, 0]
    assert count_marked([]).tolist() == []
