"""Models of the demo run in bfloat16, but not on a CPU that is much slower at it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import served_dtype


@pytest.mark.parametrize(
    ("times", "expected"), [(0.5, "bfloat16"), (1.9, "bfloat16"), (6.0, "float32")]
)
def test_float32_is_taken_where_bfloat16_is_more_than_twice_as_slow(
    times: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: 1e-3, torch.bfloat16: times * 1e-3}
    monkeypatch.setattr(served_dtype, "_product_seconds", seconds.__getitem__)
    assert served_dtype.served_dtype() == expected


def test_a_product_is_timed() -> None:
    assert 0 < served_dtype._product_seconds(torch.float32) < 10
